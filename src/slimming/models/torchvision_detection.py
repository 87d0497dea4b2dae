"""torchvision's one-stage detectors, every norm a BatchNorm whose scales can be penalised."""

import difflib
import math
import pathlib
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d, generalized_box_iou_loss

from slimming.detection.choosing import LOWEST, Detections
from slimming.detection.distillation import divergence
from slimming.errors import ConfigError, check_number
from slimming.models.init import check_io_shape, set_gammas
from slimming.models.zoo import fit_stem

NAMES = ("fcos_resnet50_fpn", "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2")
STRIDES = (8, 16, 32, 64, 128)  # of the feature maps that their heads read


class TorchvisionDetector(nn.Module):
    """A detector of torchvision whose forward gives what its heads say, before anything is decoded.

    Its own forward normalises and resizes lists of images, and in train mode gives losses. Here images come as the data
    module made them, all of one size, and losses and detections are made of the raw outputs by torchvision's own code.

    Shape: (N, C, H, W) -> {cls_logits (N, P, num_classes), bbox_regression (N, P, 4), of FCOS bbox_ctrness (N, P, 1)}, P
    predictions on five grids of strides 8 to 128.

    Args:
        net: an FCOS or a RetinaNet of torchvision.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.net.head([*self.net.backbone(x).values()])

    def loss(
        self, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]], size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Return the parts of torchvision's training loss: classification, bbox_regression, of FCOS bbox_ctrness."""
        outputs = {key: value.float() for key, value in outputs.items()}
        targets = [{"boxes": t["boxes"].to(outputs["bbox_regression"]), "labels": t["labels"]} for t in targets]
        anchors, counts = self._anchors(outputs, len(targets), size)
        levels = {"num_anchors_per_level": counts} if "bbox_ctrness" in outputs else {}
        return self.net.compute_loss(targets, outputs, anchors, **levels)

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
        deltas, scores = outputs["bbox_regression"].float(), outputs["cls_logits"].float().sigmoid()
        anchors = self._anchors(outputs, 1, size)[0][0]  # (P, 4)
        coder = self.net.box_coder
        if "bbox_ctrness" in outputs:
            return coder.decode(deltas, anchors[None]), (scores * outputs["bbox_ctrness"].float().sigmoid()).sqrt()
        flat = coder.decode_single(deltas.flatten(0, 1), anchors.expand_as(deltas).flatten(0, 1))
        return flat.view(deltas.shape), scores

    def detections(self, outputs: dict[str, Tensor], size: tuple[int, int]) -> list[Detections]:
        """Return what was found in every image, after torchvision's non-maximum suppression."""
        n = len(outputs["cls_logits"])
        anchors, counts = self._anchors(outputs, n, size)
        levels = {key: [*value.float().split(counts, 1)] for key, value in outputs.items()}
        return self.net.postprocess_detections(levels, [[*a.split(counts)] for a in anchors], [tuple(size)] * n)

    def _anchors(self, outputs: dict[str, Tensor], n: int, size: tuple[int, int]) -> tuple[list[Tensor], list[int]]:
        """Return the anchors (P, 4) of each of n images, and how many there are on every grid."""
        from torchvision.models.detection.image_list import ImageList

        like = outputs["cls_logits"]
        grids = [tuple(math.ceil(side / stride) for side in size) for stride in STRIDES]
        maps = [like.new_empty(1, 1, *grid, dtype=torch.float32) for grid in grids]
        images = ImageList(like.new_empty(1, 1, 1, 1).expand(n, 1, *size), [tuple(size)] * n)
        per_cell = self.net.anchor_generator.num_anchors_per_location()
        counts = [count * math.prod(grid) for count, grid in zip(per_cell, grids, strict=True)]
        return self.net.anchor_generator(images, maps), counts


def torchvision_detection(
    name: str,
    weights: str | None = None,
    image_size: int = 416,
    num_classes: int = 90,
    in_channels: int = 3,
    gamma_init: float | None = None,
) -> TorchvisionDetector:
    """Build a one-stage detector of torchvision; a BatchNorm2d stands wherever it has a frozen one or a GroupNorm.

    GroupNorm normalises over channels, so that none could go without changing the others. What stays whole is the feature
    pyramid: no BatchNorm writes its channels.

    Args:
        name: fcos_resnet50_fpn, retinanet_resnet50_fpn or retinanet_resnet50_fpn_v2.
        weights: None, or the path of torchvision's state dict for it; entries of another shape (the layers that depend on the
            number of classes) or of norms that were replaced stay fresh. Nothing is downloaded.
        image_size: of the images, in pixels.
        gamma_init: sets every BatchNorm scale; None keeps 1, or what `weights` brings.

    Raises:
        ConfigError: an unknown name, or weights that are not of it.
    """
    from torchvision.models import detection

    check_io_shape(num_classes, in_channels)
    check_number("data.image_size", image_size, 1, whole=True)
    if name not in NAMES:
        near = difflib.get_close_matches(str(name), NAMES, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(NAMES)}"
        raise ConfigError(f"model.name={name!r} is not a one-stage detector of torchvision with BatchNorm; {hint}")
    sizes = {"min_size": image_size, "max_size": image_size}
    net = getattr(detection, name)(
        weights=None, weights_backbone=None, num_classes=num_classes, score_thresh=LOWEST, **sizes
    )
    replace_norms(net)
    if weights is not None:
        _fill(net, name, weights)
    fit_stem(net, in_channels)
    return TorchvisionDetector(set_gammas(net, gamma_init))


def replace_norms(model: nn.Module) -> None:
    """Put a BatchNorm2d in the place of every frozen one, with its values, and of every GroupNorm, in place."""
    for parent in [*model.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, FrozenBatchNorm2d):
                norm = nn.BatchNorm2d(len(child.weight), child.eps)
                norm.load_state_dict(child.state_dict(), strict=False)  # it counts no batches
                setattr(parent, name, norm)
            elif isinstance(child, nn.GroupNorm):
                setattr(parent, name, nn.BatchNorm2d(child.num_channels))


def _fill(net: nn.Module, name: str, path: str) -> None:
    """Copy the entries of a state dict that fit."""
    if not pathlib.Path(path).is_file():
        raise ConfigError(f"model.weights={path} is not a file: give the path of a state dict of torchvision's {name}")
    try:
        given = torch.load(path, map_location="cpu", weights_only=True)
        fitting = {k: v for k, v in given.items() if k in (own := net.state_dict()) and own[k].shape == v.shape}
    except Exception as error:
        raise ConfigError(f"model.weights={path} is not a state dict: {' '.join(str(error).split())[:200]}") from error
    if not any(key.startswith("backbone.") for key in fitting):
        raise ConfigError(f"model.weights={path} is not a state dict of {name}: no weight of its backbone fits")
    net.load_state_dict(fitting, strict=False)
