"""From many scored boxes to the few that are reported."""

from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image

Detections = dict[str, Tensor]  # boxes (n, 4), scores (n,) falling, labels (n,)

LOWEST = 0.01  # score below which nothing is reported; mean average precision wants it low
OVERLAP = 0.45  # IoU above which the weaker of two boxes of a class goes: Darknet's
CANDIDATES = 1000  # the strongest of an image, which are compared with each other
MOST = 100  # detections per image: COCO's metric looks at no more


def choose(boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> list[Detections]:
    """Choose the detections of every image by non-maximum suppression within each class.

    Every class of a box is a candidate of its own: a box may be reported for two classes.

    Args:
        boxes: (N, P, 4) in pixels.
        scores: (N, P, C) in [0, 1].
        size: height and width of the images; boxes are cut there.
    """
    return [_of_image(*own, size) for own in zip(boxes.detach(), scores.detach(), strict=True)]


def _of_image(boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> Detections:
    index, labels = (scores > LOWEST).nonzero(as_tuple=True)
    found, order = scores[index, labels].sort(descending=True, stable=True)
    found, order = found[:CANDIDATES], order[:CANDIDATES]
    boxes, labels = clip_boxes_to_image(boxes[index[order]], size), labels[order]
    real = (boxes[:, 2:] > boxes[:, :2]).all(1).nonzero().flatten()  # what lies outside the image is cut to nothing
    kept = real[batched_nms(boxes[real], found[real], labels[real], OVERLAP)[:MOST]]
    return {"boxes": boxes[kept], "scores": found[kept], "labels": labels[kept]}
