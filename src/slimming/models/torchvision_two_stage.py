"""torchvision's two-stage detectors: the first stage proposes boxes, the second one looks at them."""

from typing import Any

import torch
from torch import Tensor, nn

from slimming.detection.choosing import LOWEST, Detections
from slimming.models.torchvision_one_stage import TorchvisionDetector


class FasterRcnn(TorchvisionDetector):
    """Faster R-CNN: a first stage scores and moves anchors, a second one reads the features at the best of them, the proposals.

    One of the classes is the background, its class 0. A training gives the targets to forward, so that the proposals are what
    torchvision trains on: a sample of them and of the objects' own boxes, a quarter of which hold an object where there are
    as many. Without targets they are the best ones, in train mode at most as many as are sampled.

    Shape: (N, C, H, W) -> {objectness (N * P, 1), deltas (N * P, 4), proposals, per image (K, 4) in pixels, and of all
    proposals together class_logits (sum K, classes), box_regression (sum K, 4 * classes)}.
    """

    strides = (4, 8, 16, 32, 64)
    trains_on_targets = True
    decoded = None  # how many boxes it has depends on the images
    distilled = layout = None  # a teacher would propose other boxes

    @staticmethod
    def arguments(num_classes: int, image_size: int) -> dict[str, Any]:
        # torchvision's 0.05 of the small ones can leave the second stage without a proposal
        scores = {"box_score_thresh": LOWEST, "rpn_score_thresh": 0.0}
        return {"num_classes": num_classes + 1, "min_size": image_size, "max_size": image_size, **scores}

    @property
    def anchor_generator(self) -> nn.Module:
        return self.net.rpn.anchor_generator

    def forward(self, x: Tensor, targets: list[Detections] | None = None) -> dict[str, Any]:
        from torchvision.models.detection.rpn import concat_box_prediction_layers

        features, heads = self.net.backbone(x), self.net.roi_heads
        objectness, deltas = concat_box_prediction_layers(*self.net.rpn.head([*features.values()]))
        with torch.no_grad():
            proposals = self._proposals(x, objectness.to(x), deltas.to(x))
            if targets is not None:
                proposals, *_ = heads.select_training_samples(proposals, _with_background(targets, x))
            elif self.training:
                proposals = [own[: heads.fg_bg_sampler.batch_size_per_image] for own in proposals]
        pooled = heads.box_roi_pool(features, proposals, [tuple(x.shape[-2:])] * len(x))
        logits, boxes = heads.box_predictor(heads.box_head(pooled))
        first = {"objectness": objectness, "deltas": deltas, "proposals": proposals}
        return first | {"class_logits": logits, "box_regression": boxes}

    def _proposals(self, x: Tensor, objectness: Tensor, deltas: Tensor) -> list[Tensor]:
        """Return the best moved anchors (K, 4) of every image, the best first."""
        n, size, rpn = len(x), tuple(x.shape[-2:]), self.net.rpn
        boxes = rpn.box_coder.decode(deltas, self._anchors(x, n, size)).view(n, -1, 4)
        return rpn.filter_proposals(boxes, objectness, [size] * n, self._counts(size))[0]

    def loss(self, outputs: dict[str, Any], targets: list[Detections], size: tuple[int, int]) -> dict[str, Tensor]:
        """Return the parts of torchvision's training loss.

        Both stages look at random samples. What forward has sampled is taken whole.
        """
        rpn, objectness, deltas = self.net.rpn, outputs["objectness"].float(), outputs["deltas"].float()
        targets = _with_background(targets, deltas)
        anchors = self._anchors(deltas, len(targets), size)
        labels, boxes = rpn.assign_targets_to_anchors(anchors, targets)
        parts = rpn.compute_loss(objectness, deltas, labels, rpn.box_coder.encode(boxes, anchors))
        parts += self._second_loss(outputs, targets)
        return dict(zip(("objectness", "proposals", "classification", "bbox_regression"), parts, strict=True))

    def _second_loss(self, outputs: dict[str, Any], targets: list[Detections]) -> tuple[Tensor, Tensor]:
        from torchvision.models.detection.roi_heads import fastrcnn_loss

        heads, proposals = self.net.roi_heads, [own.float() for own in outputs["proposals"]]
        # an image without proposals is to torchvision an error, unless it has no objects either
        boxes = [t["boxes"] if len(own) else t["boxes"][:0] for t, own in zip(targets, proposals, strict=True)]
        matched, labels = heads.assign_targets_to_proposals(proposals, boxes, [target["labels"] for target in targets])
        sampled = heads.subsample(labels)
        starts = [sum(map(len, proposals[:i])) for i in range(len(proposals))]
        rows = torch.cat([start + own for start, own in zip(starts, sampled, strict=True)])
        boxes = [own if len(own) else own.new_zeros(1, 4) for own in boxes]  # of an image without objects, for none
        goals = [own[m[s]] for own, m, s in zip(boxes, matched, sampled, strict=True)]
        labels, proposals = ([own[s] for own, s in zip(all_, sampled, strict=True)] for all_ in (labels, proposals))
        found = [outputs[key].float()[rows] for key in ("class_logits", "box_regression")]
        if not len(rows):  # the mean over no proposal would be nan
            return found[0].sum(), found[1].sum()
        return fastrcnn_loss(*found, labels, heads.box_coder.encode(goals, proposals))

    def detections(self, outputs: dict[str, Any], size: tuple[int, int]) -> list[Detections]:
        proposals = [own.float() for own in outputs["proposals"]]
        found = (outputs[key].float() for key in ("class_logits", "box_regression"))
        chosen = self.net.roi_heads.postprocess_detections(*found, proposals, [tuple(size)] * len(proposals))
        keys = ("boxes", "scores", "labels")
        return [dict(zip(keys, (b, s, n - 1), strict=True)) for b, s, n in zip(*chosen, strict=True)]


class MobileFasterRcnn(FasterRcnn):
    """Faster R-CNN on MobileNetV3, whose pyramid begins at a stride of 32."""

    strides = (32, 32, 64)


def _with_background(targets: list[Detections], like: Tensor) -> list[Detections]:
    """Return targets as networks that count the background as class 0 take them."""
    return [{"boxes": t["boxes"].to(like), "labels": t["labels"] + 1} for t in targets]
