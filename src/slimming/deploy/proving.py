"""The proof of an artefact: it computes on images what the network computes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from slimming.deploy.capturing import plain_copy
from slimming.errors import ExportError

TOLERANCE = 1e-4  # of float32 artefacts: rounding in another order gives some 1e-6


@dataclass
class Proof:
    """How an artefact compares with its network.

    Attributes:
        images: how many were compared.
        difference: the largest between two logits; relative: the same as a share of the largest |logit|.
        accuracy, accuracy_before: of the artefact and of the network, in [0, 1]; None without labels.
    """

    images: int = 0
    difference: float = 0.0
    largest: float = 0.0
    correct: int = 0
    correct_before: int = 0
    labelled: int = 0

    @property
    def relative(self) -> float:
        return self.difference / self.largest if self.largest else self.difference

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.labelled if self.labelled else None

    @property
    def accuracy_before(self) -> float | None:
        return self.correct_before / self.labelled if self.labelled else None


def prove(
    run: Callable[[np.ndarray], np.ndarray], model: nn.Module, batches: Iterable[tuple[Tensor, Tensor | None]]
) -> Proof:
    """Compare an artefact with the network that it was made from.

    Args:
        run: what the artefact computes.
        batches: float images (N, C, H, W), and labels (N,) or None.
    """
    model, proof = plain_copy(model), Proof()
    for images, labels in batches:
        with torch.inference_mode():
            expected = model(images.float())
        found = torch.from_numpy(run(images.float().numpy()))
        if found.shape != expected.shape:
            raise ExportError(
                f"the artefact gives {tuple(found.shape)} where the network gives {tuple(expected.shape)}"
            )
        proof.images += len(images)
        differences = (found - expected).abs().nan_to_num(nan=float("inf"))
        proof.difference = max(proof.difference, differences.max().item())
        proof.largest = max(proof.largest, expected.abs().max().item())
        if labels is not None:
            proof.labelled += len(labels)
            proof.correct += int((found.argmax(1) == labels).sum())
            proof.correct_before += int((expected.argmax(1) == labels).sum())
    return proof


def check(proof: Proof, tolerance: float = TOLERANCE) -> None:
    """Raise ExportError unless the logits agree to a share of the largest."""
    if not proof.relative <= tolerance:
        raise ExportError(
            f"the artefact does not compute what the network computes: on {proof.images} images their logits differ by up to "
            f"{proof.difference:.2g}, {proof.relative:.1e} of the largest (allowed: {tolerance:.0e}); nothing is left"
        )
