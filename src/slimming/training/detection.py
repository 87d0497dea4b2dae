"""The training of detectors: their own loss, the gamma penalty, mean average precision."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from slimming.errors import ConfigError
from slimming.quiet import only_errors
from slimming.training.module import PenalisedModule

BACKENDS = ("faster_coco_eval", "pycocotools")  # packages, the faster one first; both compute the same
HALF = ("bf16-true", "16-true", "transformer-engine", "transformer-engine-float16")  # Lightning casts targets as well
PRECISIONS = {"map50": "map_50", "map": "map"}  # what is logged -> what torchmetrics calls it

Target = dict[str, Tensor]  # boxes (n, 4) in pixels, corners x1 y1 x2 y2; labels (n,)


class DetectionModule(PenalisedModule):
    """Trains a detector on its loss + sparsity * sum |gamma|, or with another penalty on the gammas.

    Logs the parts of the loss as `train/<part>`, and of an evaluation `map50` and `map`: mean average precision at an IoU of
    0.5, and over 0.5, 0.55 ... 0.95, as COCO defines them (101 points of recall, 100 detections per image, mean over the
    classes that occur). They are left out where an evaluation saw no object at all.

    Args:
        model: images (N, C, H, W) -> raw outputs, with `loss(outputs, targets, size)`, a dict of scalars whose sum is
            trained, and `detections(outputs, size)`, per image {boxes, scores, labels}; size is (H, W). A network with
            `trains_on_targets` is called on images and targets in a training.
        others: as of PenalisedModule.

    Raises:
        ConfigError: as PenalisedModule; or no package that computes the metric is installed, or another kind of network.
    """

    score = "map50"

    def __init__(self, model: nn.Module, *others: Any, **more: Any):
        super().__init__(model, *others, **more)
        check_detector(model)
        self.backend = metric_backend()
        self._parts: dict[str, Tensor] = {}  # part of the loss -> sum over this rank's training images of the epoch
        self._seen: list[tuple[Target, Target]] = []  # this rank's images of an evaluation: (detections, target)

    def setup(self, stage: str) -> None:
        if str(self.trainer.precision) in HALF:
            raise ConfigError(
                f"trainer.precision={self.trainer.precision} rounds the corners of boxes to 8 or 11 bits: take bf16-mixed, "
                "16-mixed or 32-true for a detector"
            )

    def training_step(self, batch: tuple[Tensor, list[Target]], batch_idx: int) -> Tensor:
        images, targets = batch  # (N, C, H, W), N of them
        _check_targets(targets)
        given = (targets,) if getattr(self.model, "trains_on_targets", False) else ()
        parts = self.parts_of_loss(images, self.model(images, *given), targets)
        loss = torch.stack([*parts.values()]).sum()
        for name, value in parts.items():
            self._parts[name] = self._parts.get(name, 0) + value.detach() * len(targets)
        self.account("train", loss.detach(), len(targets))
        self.watch_loss(loss.detach(), batch_idx)
        return loss

    def parts_of_loss(self, images: Tensor, outputs: Any, targets: list[Target]) -> dict[str, Tensor]:
        """Return the parts of the loss of a training batch, without the penalty."""
        return self.model.loss(outputs, targets, images.shape[-2:])

    def evaluate(self, split: str, batch: tuple[Tensor, list[Target]]) -> None:
        images, targets = batch
        _check_targets(targets)
        outputs, size = self.model(images), images.shape[-2:]
        found = self.model.detections(outputs, size)
        self.account(split, sum(self.model.loss(outputs, targets, size).values()), len(targets))
        for pair in zip(found, targets, strict=True):
            self._seen.append(tuple({key: value.cpu() for key, value in part.items()} for part in pair))

    def begin(self, split: str) -> None:
        super().begin(split)
        if split == "train":
            self._parts = {}
        else:
            self._seen = []

    def report(self, split: str) -> None:
        super().report(split)
        if split == "train":
            sums = torch.stack([value.float() for value in self._parts.values()])
            means = self.trainer.strategy.reduce(sums, reduce_op="sum") / self.evaluated[split]
            logged = dict(zip(self._parts, means, strict=True))
        else:
            logged = self._precision()
        for name, value in logged.items():
            self.log(f"{split}/{name}", value, sync_dist=True)  # equal on all ranks already; this says so

    def _precision(self) -> dict[str, float]:
        """Return the metrics of an evaluation over all ranks.

        The images are put back into the order in which one rank sees them: detections of equal scores count in their order.
        """
        shares: list[Any] = [self._seen]
        if self.trainer.world_size > 1:
            shares = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(shares, self._seen)
        self._seen = []
        longest = max(map(len, shares))
        in_order = [share[i] for i in range(longest) for share in shares if i < len(share)]
        return mean_average_precision(in_order, self.backend)


def mean_average_precision(pairs: list[tuple[Target, Target]], backend: str) -> dict[str, float]:
    """Return {map50, map} of images, each (detections, target); {} where no target holds an object."""
    from torchmetrics.detection import MeanAveragePrecision

    if not any(len(target["labels"]) for _, target in pairs):
        return {}
    metric = MeanAveragePrecision(backend=backend, sync_on_compute=False)
    metric.warn_on_many_detections = False  # a class of an image may well have more than 100
    metric.update([found for found, _ in pairs], [target for _, target in pairs])
    with only_errors("faster_coco_eval"):  # it tells a table of its own
        computed = metric.compute()
    return {name: float(computed[theirs]) for name, theirs in PRECISIONS.items()}


def metric_backend() -> str:
    """Return the package that computes mean average precision.

    Raises:
        ConfigError: none is installed.
    """
    for package in BACKENDS:
        if find_spec(package):
            return package
    raise ConfigError(
        "task=detection measures mean average precision with the package faster-coco-eval or pycocotools: "
        "pip install 'slimming[detection]'"
    )


def check_detector(model: nn.Module) -> None:
    """Raise ConfigError for a network that is no detector."""
    if not all(callable(getattr(model, name, None)) for name in ("loss", "detections")):
        raise ConfigError(
            f"task=detection trains a detector, and {type(model).__name__} has no methods loss(outputs, targets, size) and "
            "detections(outputs, size): choose model=yolov3, yolov3_tiny or torchvision_detection"
        )


def _check_targets(targets: Any) -> None:
    if isinstance(targets, Tensor):
        raise ConfigError(
            "task=detection needs images with boxes, and these have one class each: give data=boxes or data=scenes"
        )
