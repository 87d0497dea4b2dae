"""What the stages must know of a task: classification, and detection. Everything else is the same for both."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimming.config import ExportConfig, TrainConfig
from slimming.data import ImageData
from slimming.deploy.capturing import BATCH, OUTPUT
from slimming.detection.exported import BoxesOut
from slimming.errors import ConfigError
from slimming.records import SCORES
from slimming.report import detections
from slimming.report.runs import DETECTIONS
from slimming.stages.building import dtype_of, example_of, takes, try_model
from slimming.training.detection import DetectionModule
from slimming.training.distillation import DistillingDetectionModule, DistillingModule, check_same_layout
from slimming.training.module import PenalisedModule, SlimmingModule

DRAWN = 4  # test images


class Task:
    """A kind of network and what it is judged by.

    Attributes:
        name: value of the option `task`.
        metrics: what an evaluation logs beside the loss, `test/<metric>`, in [0, 1].
        told: facts of the data that a model factory is told; and if it wants to know, `asked_for`.
        temperature, alpha: of `distill`, where they are not given.
    """

    name: str
    metrics: tuple[str, ...]
    told = ("num_classes", "in_channels")
    asked_for: tuple[str, ...] = ()
    temperature: float
    alpha: float

    @property
    def score(self) -> str:
        """Key of the metric that a network is judged by, `test/<score>`."""
        return SCORES[self.name].key

    @property
    def called(self) -> str:
        """What that metric is called: `accuracy`."""
        return SCORES[self.name].called

    def facts(self, node: dict[str, Any], seen: dict[str, Any]) -> dict[str, int]:
        """Return what the factory of a group `model` is told of the data whose statistics are given."""
        return {key: seen[key] for key in (*self.told, *(key for key in self.asked_for if takes(node, key)))}

    def measured(self, logged: dict[str, Any], *splits: str) -> dict[str, float]:
        """Return the metrics among what an evaluation of some splits has logged."""
        keys = [f"{split}/{metric}" for split in splits for metric in self.metrics]
        return {key: float(logged[key]) for key in keys if key in logged}

    def module(self, model: nn.Module, num_classes: int, **training: Any) -> PenalisedModule:
        """Build the LightningModule that trains and measures a network.

        Args:
            training: as of PenalisedModule, and where there is a teacher of Taught.

        Raises:
            ConfigError: a network of another task.
        """
        raise NotImplementedError

    def check_teacher(self, path: str, teacher: nn.Module, student: nn.Module, data: ImageData) -> None:
        """Raise ConfigError unless the network of a file can teach another one on these data."""
        raise NotImplementedError

    def draw(self, networks: dict[str, nn.Module], data: ImageData, out: Path) -> None:
        """Draw into a run folder what networks on the CPU, by name, find in test images, if that can be seen."""

    def check_export(self, cfg: ExportConfig) -> None:
        """Raise ConfigError for an export that there is not for this task."""

    def exported(self, model: nn.Module) -> nn.Module:
        """Return what an artefact computes: the network with one output, that other programs can use."""
        return model

    def output(self, model: nn.Module, example: Tensor, seen: dict[str, Any]) -> dict[str, Any]:
        """Describe the output of an artefact.

        Args:
            model: what it computes.
            example: (1, C, H, W).
            seen: statistics of the data.
        """
        return {"name": OUTPUT, "shape": [BATCH, seen["num_classes"]], "classes": seen.get("classes")}


class Classification(Task):
    """One class per image."""

    name, metrics = "classification", ("acc",)
    temperature, alpha = 4.0, 0.9

    def module(self, model: nn.Module, num_classes: int, **training: Any) -> PenalisedModule:
        if callable(getattr(model, "detections", None)):
            raise ConfigError(f"{type(model).__name__} is a detector: give task=detection")
        kind = DistillingModule if "teacher" in training else SlimmingModule
        return kind(model, num_classes, **training)

    def check_teacher(self, path: str, teacher: nn.Module, student: nn.Module, data: ImageData) -> None:
        if callable(getattr(teacher, "detections", None)):
            raise ConfigError(
                f"distill.teacher={path} is a detector, {type(teacher).__name__}, and this network is a classifier: "
                "give a classifier of the same classes"
            )
        try_model(teacher, example_of(data))
        classes = teacher(example_of(data).to(dtype_of(teacher))).shape[1]
        if classes != data.num_classes:
            raise ConfigError(f"distill.teacher={path} knows {classes} classes, the data have {data.num_classes}")


class Detection(Task):
    """Boxes of objects, each of a class."""

    name, metrics = "detection", ("map50", "map")
    asked_for = ("image_size",)
    temperature, alpha = 1.0, 0.5  # teacher and labels alike, chances as they are

    def module(self, model: nn.Module, num_classes: int, **training: Any) -> PenalisedModule:
        kind = DistillingDetectionModule if "teacher" in training else DetectionModule
        return kind(model, **training)

    def check_teacher(self, path: str, teacher: nn.Module, student: nn.Module, data: ImageData) -> None:
        check_same_layout(path, teacher, student)
        try_model(teacher, example_of(data))

    def draw(self, networks: dict[str, nn.Module], data: ImageData, out: Path) -> None:
        images, targets = data.first("test", DRAWN)
        images = data.transform(images)
        found = {}
        for name, model in networks.items():
            was_training = model.training
            with torch.no_grad():
                # not model(...): compile=true has compiled that, perhaps for another device
                found[name] = model.eval().detections(model.forward(images.to(dtype_of(model))), images.shape[-2:])
            model.train(was_training)
        detections.detections(images, data.mean, data.std, targets, found, data.class_names, out / DETECTIONS)

    def check_export(self, cfg: ExportConfig) -> None:
        if cfg.quantize.to:
            raise ConfigError(
                f"quantize={cfg.quantize.to} is for classifiers, and this network is a detector: leave it out"
            )
        if cfg.format == "safetensors":
            raise ConfigError(
                "format=safetensors holds weights and gives raw outputs, and boxes are what is exported of a detector: take "
                "format=onnx, openvino or torch, or load its checkpoint by slimming.load"
            )

    def exported(self, model: nn.Module) -> nn.Module:
        return BoxesOut(model)

    def output(self, model: nn.Module, example: Tensor, seen: dict[str, Any]) -> dict[str, Any]:
        with torch.inference_mode():
            shape = model.eval()(example).shape[1:]
        holds = "x1 y1 x2 y2 as shares of width and height, then a score per class; before non-maximum suppression"
        return {"name": "boxes", "shape": [BATCH, *shape], "classes": seen.get("classes"), "holds": holds}


TASKS: dict[str, Task] = {task.name: task for task in (Classification(), Detection())}


def task_of(config: TrainConfig | dict[str, Any] | None) -> Task:
    """Return the task of a training, or of the configuration that a record holds; those of earlier versions name none.

    Raises:
        ConfigError: the record names one that there is not.
    """
    name = config.task if isinstance(config, TrainConfig) else (config or {}).get("task", Classification.name)
    if name not in TASKS:
        raise ConfigError(f"task={name!r} is not known; there are {', '.join(TASKS)}")
    return TASKS[name]
