"""Training with a teacher."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimming.errors import ConfigError
from slimming.training.detection import DetectionModule, Target
from slimming.training.module import PenalisedModule, SlimmingModule


class Taught(PenalisedModule):
    """Holds a teacher beside the network that learns: alpha * loss against the teacher + (1 - alpha) * loss of the task.

    The teacher sees the same augmented images, in eval mode and without gradients; it is no part of the module's state.
    Its outputs are not cached: every epoch augments anew.

    Args:
        teacher: a network of the same inputs and outputs.
        temperature: T > 0, which softens the chances of the classes.
        alpha: weight of the teacher, in [0, 1].
        others: as of the module that this class stands before.
    """

    def __init__(self, *others: Any, teacher: nn.Module, temperature: float, alpha: float, **more: Any):
        super().__init__(*others, **more)
        self._held = (teacher.eval().requires_grad_(False),)  # in a tuple, so that it is no submodule
        self.temperature, self.alpha = temperature, alpha

    def on_fit_start(self) -> None:
        self._held[0].to(self.device, self.dtype)

    def taught(self, images: Tensor) -> Any:
        """Return what the teacher makes of images."""
        with torch.no_grad():
            return self._held[0](images)


class DistillingModule(Taught, SlimmingModule):
    """Learns from a teacher's logits as well: alpha * T^2 * KL(teacher / T || student / T) + (1 - alpha) * cross-entropy.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531, section 2.
    """

    def task_loss(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        target = F.log_softmax(self.taught(images).float() / self.temperature, 1)
        student = F.log_softmax(logits.float() / self.temperature, 1)
        soft = F.kl_div(student, target, reduction="batchmean", log_target=True) * self.temperature**2
        return self.alpha * soft + (1 - self.alpha) * F.cross_entropy(logits, labels)


class DistillingDetectionModule(Taught, DetectionModule):
    """Learns from another detector's raw outputs as well, see slimming.detection.distillation.

    The parts of the loss that are logged are weighted, so that they add up to it; those against the teacher are
    `train/teacher_<part>`.

    Args:
        model, teacher: detectors whose `layout()` is the same; the model has
            `distilled(outputs, teacher_outputs, size, temperature)`, a dict of scalars.
    """

    def parts_of_loss(self, images: Tensor, outputs: Any, targets: list[Target]) -> dict[str, Tensor]:
        own = super().parts_of_loss(images, outputs, targets)
        soft = self.model.distilled(outputs, self.taught(images), images.shape[-2:], self.temperature)
        weighted = {name: (1 - self.alpha) * value for name, value in own.items()}
        return weighted | {f"teacher_{name}": self.alpha * value for name, value in soft.items()}


def check_same_layout(path: str, teacher: nn.Module, student: nn.Module) -> None:
    """Raise ConfigError unless a detector of the file `path` can teach another one."""
    for network, whose in ((student, "the network to train"), (teacher, f"distill.teacher={path}")):
        if not all(callable(getattr(network, name, None)) for name in ("distilled", "layout")):
            raise ConfigError(
                f"{whose}, {type(network).__name__}, is not a detector that learns from a teacher or teaches: it has no "
                "methods distilled(outputs, teacher, size, temperature) and layout(); give a teacher of "
                "model=yolov3 or yolov3_tiny, FCOS or RetinaNet of torchvision_detection, or leave distill.teacher out"
            )
    theirs, ours = teacher.layout(), student.layout()
    for key in [*ours, *(theirs.keys() - ours.keys())]:
        if theirs.get(key) != ours.get(key):
            raise ConfigError(
                f"distill.teacher={path} has raw outputs with {key}={theirs.get(key)}, the network to train with "
                f"{key}={ours.get(key)}: they cannot be compared; take a teacher of the same kind of network, such as the "
                "one that it was pruned from"
            )
