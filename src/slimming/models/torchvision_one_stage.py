"""torchvision's one-stage detectors: what their raw outputs mean."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou, generalized_box_iou_loss

from slimming.detection.choosing import LOWEST, Detections
from slimming.detection.distillation import divergence


class TorchvisionDetector(nn.Module):
    """A detector of torchvision whose forward gives what its heads say, before anything is decoded.

    Its own forward normalises and resizes lists of images, and in train mode gives losses. Here images come as the data
    module made them, all of one size, and losses and detections are made of the raw outputs by torchvision's own code.
    This class does so for RetinaNet.

    Shape: (N, C, H, W) -> {cls_logits (N, P, classes), bbox_regression (N, P, 4)}, P predictions on grids of all strides.

    Args:
        net: a network of torchvision.

    Attributes:
        strides: pixels per cell of the feature maps that its heads read.
    """

    strides: tuple[int, ...] = (8, 16, 32, 64, 128)

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    @staticmethod
    def arguments(num_classes: int, image_size: int) -> dict[str, Any]:
        """Return what torchvision's factory is told."""
        return {"num_classes": num_classes, "score_thresh": LOWEST, "min_size": image_size, "max_size": image_size}

    @property
    def anchor_generator(self) -> nn.Module:
        return self.net.anchor_generator

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.net.head([*self.net.backbone(x).values()])

    def loss(
        self, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]], size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Return the parts of torchvision's training loss: classification, bbox_regression, of FCOS bbox_ctrness."""
        outputs = {key: value.float() for key, value in outputs.items()}
        targets = [{"boxes": t["boxes"].to(outputs["bbox_regression"]), "labels": t["labels"]} for t in targets]
        return self._loss(outputs, targets, self._anchors(outputs["cls_logits"], len(targets), size), size)

    def layout(self) -> dict[str, Any]:
        """Return what the raw outputs of two networks have in common where they mean the same."""
        anchors = self.net.anchor_generator
        return {
            "network": type(self.net).__name__,
            "classes": self.net.head.classification_head.num_classes,
            "anchors": (anchors.sizes, anchors.aspect_ratios),
        }

    def distilled(
        self, outputs: dict[str, Tensor], teacher: dict[str, Tensor], size: tuple[int, int], temperature: float
    ) -> dict[str, Tensor]:
        """Return the parts of the loss against the raw outputs of another network.

        As slimming.detection.distillation has it: what is likeliest in a place says how sure a network is that there is an
        object (`objectness`, matched everywhere), and the teacher weighs the rest by it: the classes, the boxes by
        generalised IoU, of FCOS the centre-ness. All are divided by the sum of these weights, but at least 1, as the
        training loss is by the number of predictions that have an object.

        Source: Yang et al., Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object Detection,
        arXiv:2308.14286, for the form of the parts: each class a yes or no of its own, boxes by an IoU.

        Args:
            temperature: of the classes.
        """
        student, other = ({key: value.float() for key, value in raw.items()} for raw in (outputs, teacher))
        logits = student["cls_logits"], other["cls_logits"]  # (N, P, num_classes)
        likeliest = [each.amax(-1) for each in logits]  # (N, P)
        sure = likeliest[1].sigmoid()
        boxes = [self.decoded(raw, size)[0] for raw in (student, other)]
        parts = {
            "classification": sure[..., None] * divergence(*logits, temperature),
            "objectness": divergence(*likeliest),
            "bbox_regression": sure * generalized_box_iou_loss(*boxes),
        }
        if "bbox_ctrness" in student:
            parts["bbox_ctrness"] = sure[..., None] * divergence(student["bbox_ctrness"], other["bbox_ctrness"])
        return {name: part.sum() / sure.sum().clamp(min=1) for name, part in parts.items()}

    def decoded(self, outputs: dict[str, Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return all boxes (N, P, 4) in pixels and their scores (N, P, num_classes) in [0, 1], as torchvision scores them."""
        outputs = {key: value.float() for key, value in outputs.items()}
        deltas = outputs["bbox_regression"]
        anchors = self._anchors(deltas, 1, size)[0].expand_as(deltas)
        boxes = self.net.box_coder.decode_single(deltas.flatten(0, 1), anchors.flatten(0, 1))
        return boxes.view(deltas.shape), self._scores(outputs)

    def detections(self, outputs: dict[str, Tensor], size: tuple[int, int]) -> list[Detections]:
        """Return what was found in every image, after torchvision's non-maximum suppression."""
        outputs = {key: value.float() for key, value in outputs.items()}
        logits = outputs["cls_logits"]
        return self._detections(outputs, self._anchors(logits, len(logits), size), size)

    def _loss(
        self, outputs: dict[str, Tensor], targets: list[Detections], anchors: list[Tensor], size: tuple[int, int]
    ) -> dict[str, Tensor]:
        return self.net.compute_loss(targets, outputs, anchors)

    def _scores(self, outputs: dict[str, Tensor]) -> Tensor:
        return outputs["cls_logits"].sigmoid()

    def _detections(self, outputs: dict[str, Tensor], anchors: list[Tensor], size: tuple[int, int]) -> list[Detections]:
        counts = self._counts(size)
        levels = {key: [*value.split(counts, 1)] for key, value in outputs.items()}
        return self.net.postprocess_detections(
            levels, [[*a.split(counts)] for a in anchors], [tuple(size)] * len(anchors)
        )

    def _grids(self, size: tuple[int, int]) -> list[tuple[int, ...]]:
        """Return the rows and columns of every feature map."""
        return [tuple(math.ceil(side / stride) for side in size) for stride in self.strides]

    def _counts(self, size: tuple[int, int]) -> list[int]:
        """Return how many predictions there are on every grid."""
        per_cell = self.anchor_generator.num_anchors_per_location()
        return [count * math.prod(grid) for count, grid in zip(per_cell, self._grids(size), strict=True)]

    def _anchors(self, like: Tensor, n: int, size: tuple[int, int]) -> list[Tensor]:
        """Return the anchors (P, 4) of each of n images, of the type of a tensor."""
        from torchvision.models.detection.image_list import ImageList

        maps = [like.new_empty(1, 1, *grid) for grid in self._grids(size)]
        images = ImageList(like.new_empty(1, 1, 1, 1).expand(n, 1, *size), [tuple(size)] * n)
        return self.anchor_generator(images, maps)


class Fcos(TorchvisionDetector):
    """FCOS, which also says how central a cell is in its object: bbox_ctrness (N, P, 1)."""

    def decoded(self, outputs: dict[str, Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        outputs = {key: value.float() for key, value in outputs.items()}
        anchors = self._anchors(outputs["cls_logits"], 1, size)[0]
        return self.net.box_coder.decode(outputs["bbox_regression"], anchors[None]), self._scores(outputs)

    def _loss(
        self, outputs: dict[str, Tensor], targets: list[Detections], anchors: list[Tensor], size: tuple[int, int]
    ) -> dict[str, Tensor]:
        return self.net.compute_loss(targets, outputs, anchors, self._counts(size))

    def _scores(self, outputs: dict[str, Tensor]) -> Tensor:
        return (outputs["cls_logits"].sigmoid() * outputs["bbox_ctrness"].sigmoid()).sqrt()


class Ssd(TorchvisionDetector):
    """SSD: one of the classes is the background, its class 0; the others follow in their order.

    Its default boxes are shares of the image, whatever its size.
    """

    strides = (16, 32, 64, 128, 256, 512)
    distilled = layout = None  # its classes exclude each other, and what teaches them is made for those that do not

    @staticmethod
    def arguments(num_classes: int, image_size: int) -> dict[str, Any]:
        return {"num_classes": num_classes + 1, "score_thresh": LOWEST}

    def _loss(
        self, outputs: dict[str, Tensor], targets: list[Detections], anchors: list[Tensor], size: tuple[int, int]
    ) -> dict[str, Tensor]:
        targets = [target | {"labels": target["labels"] + 1} for target in targets]
        return self.net.compute_loss(targets, outputs, anchors, [*map(self._matched, targets, anchors)])

    def _matched(self, target: Detections, anchors: Tensor) -> Tensor:
        """Return the number of the object that each anchor (P, 4) is to find; -1 where it is to find none."""
        if not len(target["boxes"]):
            return anchors.new_full((len(anchors),), -1, dtype=torch.long)
        return self.net.proposal_matcher(box_iou(target["boxes"], anchors))

    def _scores(self, outputs: dict[str, Tensor]) -> Tensor:
        return outputs["cls_logits"].softmax(-1)[..., 1:]

    def _detections(self, outputs: dict[str, Tensor], anchors: list[Tensor], size: tuple[int, int]) -> list[Detections]:
        found = self.net.postprocess_detections(outputs, anchors, [tuple(size)] * len(anchors))
        return [own | {"labels": own["labels"] - 1} for own in found]
