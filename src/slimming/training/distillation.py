"""Training with a teacher."""

import torch
from torch import nn
from torch.nn import functional as F

from slimming.training.module import SlimmingModule


class DistillingModule(SlimmingModule):
    """Learns from a teacher's logits as well: alpha * T^2 * KL(teacher / T || student / T) + (1 - alpha) * cross-entropy.

    The teacher sees the same augmented images, in eval mode and without gradients; it is no part of the module's state.
    Its logits are not cached: every epoch augments anew.

    Args:
        teacher: (N, C, H, W) -> (N, num_classes) logits.
        temperature: T > 0.
        alpha: weight of the teacher, in [0, 1].

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531, section 2.
    """

    def __init__(self, *args, teacher: nn.Module, temperature: float = 4.0, alpha: float = 0.9, **kwargs):
        super().__init__(*args, **kwargs)
        self._held = (teacher.eval().requires_grad_(False),)  # in a tuple, so that it is no submodule
        self.temperature, self.alpha = temperature, alpha

    def on_fit_start(self) -> None:
        self._held[0].to(self.device, self.dtype)

    def task_loss(self, images: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = F.log_softmax(self._held[0](images).float() / self.temperature, 1)
        student = F.log_softmax(logits.float() / self.temperature, 1)
        soft = F.kl_div(student, target, reduction="batchmean", log_target=True) * self.temperature**2
        return self.alpha * soft + (1 - self.alpha) * F.cross_entropy(logits, labels)
