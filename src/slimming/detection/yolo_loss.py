"""The loss of YOLOv3.

Source: Redmon and Farhadi, YOLOv3: An Incremental Improvement, arXiv:1804.02767, sections 2.1 to 2.3, and, where the paper
is silent, the gradients of the authors' code (github.com/pjreddie/darknet, src/yolo_layer.c).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou

from slimming.detection.predictions import Predictions, Priors, predictions

IGNORED = 0.5  # IoU from which a prediction without an object of its own is not taught that there is none


@dataclass
class Matches:
    """The M objects of a batch, each with the one prediction that is responsible for it.

    Attributes:
        image, index: (M,) number of the image, and of the prediction in it.
        boxes: (M, 4); labels: (M,).
    """

    image: Tensor
    index: Tensor
    boxes: Tensor
    labels: Tensor


def yolo_loss(
    outputs: Sequence[Tensor], targets: list[dict[str, Tensor]], priors: Priors, strides: Sequence[int]
) -> dict[str, Tensor]:
    """Return the parts of the loss, `box`, `objectness` and `classes`; each is summed over an image, the mean over the batch.

    * Every object has one responsible prediction: of all priors of all scales the one whose shape overlaps the object most,
      in the cell that holds the object's centre (section 2.1). Where two objects share one, both teach it.
    * objectness: binary cross-entropy, 1 where a prediction is responsible, 0 elsewhere; left out where a prediction is not
      responsible but its box overlaps an object with an IoU above 0.5 (section 2.1; measured on the predicted box, as in the
      authors' code, for a prior alone has no place).
    * classes: binary cross-entropy of every class for responsible predictions (section 2.2).
    * box: for responsible predictions the squared error, halved, of t_w and t_h, and of the centre the binary cross-entropy,
      whose gradient in t_x and t_y is the paper's "ground truth value minus prediction" (section 2.1); both times
      2 - the share of the image that the object covers (authors' code), so that small objects count.

    An image without objects teaches objectness alone.

    Args:
        outputs, priors, strides: as `predictions` takes them.
        targets: per image {boxes (n, 4) in pixels, labels (n,)}; n may be 0.
    """
    found = predictions(outputs, priors, strides)
    matches = match(found, targets)
    n = len(targets)
    here = matches.image, matches.index
    box = _box_loss(found, matches)
    wanted = torch.zeros_like(found.classes[here])  # (M, C)
    wanted[torch.arange(len(matches.labels), device=wanted.device), matches.labels] = 1
    classes = F.binary_cross_entropy_with_logits(found.classes[here], wanted, reduction="sum")
    return {"box": box / n, "objectness": _objectness_loss(found, matches, targets) / n, "classes": classes / n}


def match(found: Predictions, targets: list[dict[str, Tensor]]) -> Matches:
    """Find the responsible prediction of every object."""
    device = found.objectness.device
    boxes = torch.cat([t["boxes"] for t in targets]).to(found.centre)  # (M, 4)
    labels = torch.cat([t["labels"] for t in targets])
    image = torch.arange(len(targets), device=device).repeat_interleave(
        torch.tensor([len(t["labels"]) for t in targets], device=device)
    )
    best = shape_iou(boxes[:, 2:] - boxes[:, :2], found.priors[found.starts]).argmax(1)  # (M,); the first of equal ones
    first, grids = found.starts[best], found.grids[best]  # (M,), (M, 2)
    cell = (_centres(boxes) / found.strides[first]).long().clamp(min=0)  # (M, 2) column and row
    column, row = cell.minimum(grids.flip(1) - 1).unbind(1)
    return Matches(image, first + row * grids[:, 1] + column, boxes, labels)


def shape_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the IoU (M, K) of shapes (M, 2) and (K, 2), laid centre on centre."""
    common = torch.minimum(a[:, None], b[None]).prod(-1)
    return common / (a.prod(-1)[:, None] + b.prod(-1)[None] - common)


def _centres(boxes: Tensor) -> Tensor:
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def _box_loss(found: Predictions, matches: Matches) -> Tensor:
    here, index = (matches.image, matches.index), matches.index
    extent = matches.boxes[:, 2:] - matches.boxes[:, :2]
    height, width = found.size
    weight = (2 - extent.prod(1) / (height * width))[:, None]  # (M, 1)
    centre = (_centres(matches.boxes) / found.strides[index] - found.cells[index]).clamp(0, 1)
    ratio = (extent / found.priors[index]).log()
    place = F.binary_cross_entropy_with_logits(found.centre[here], centre, weight.expand_as(centre), reduction="sum")
    return place + (weight * (found.extent[here] - ratio).square()).sum() / 2


def _objectness_loss(found: Predictions, matches: Matches, targets: list[dict[str, Tensor]]) -> Tensor:
    wanted = torch.zeros_like(found.objectness)  # (N, P)
    wanted[matches.image, matches.index] = 1
    counts = wanted.clone()
    with torch.no_grad():
        for own, boxes, target in zip(counts, found.boxes(), targets, strict=True):
            if len(target["boxes"]):
                overlap = box_iou(boxes, target["boxes"].to(boxes)).amax(1)  # (P,)
                own[overlap <= IGNORED] = 1
            else:
                own.fill_(1)
    return F.binary_cross_entropy_with_logits(found.objectness, wanted, counts, reduction="sum")
