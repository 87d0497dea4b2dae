"""What the YOLOv3 networks share: units of convolution, priors, outputs, and what their outputs mean."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimming.detection.choosing import Detections, choose
from slimming.detection.distillation import yolo_distillation
from slimming.detection.predictions import NUMBERS, predictions
from slimming.detection.yolo_loss import yolo_loss
from slimming.errors import ConfigError, check_number
from slimming.models.init import check_io_shape, initialise

PAPER_SIZE = 416  # pixels of the images that the paper's priors are for
LIKELY = 0.01  # the chance of an object in a fresh network's prediction: most predictions have none


class Unit(nn.Sequential):
    """Convolution without bias, BatchNorm, LeakyReLU 0.1; (N, C, H, W) -> (N, C', H / stride, W / stride)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.LeakyReLU(0.1, inplace=True),
        )


class Yolo(nn.Module):
    """A network whose outputs are predictions on grids of several scales, the coarsest first.

    Shape: (N, in_channels, H, W), H and W multiples of 32 -> per scale (N, A * (5 + num_classes), H / stride, W / stride).

    Attributes:
        strides: pixels per cell of every scale.
        priors: per scale A widths and heights, in pixels.
    """

    strides: tuple[int, ...]

    def __init__(
        self,
        priors: Sequence[Sequence[float]],
        width: float,
        num_classes: int,
        in_channels: int,
        image_size: int,
        gamma_init: float,
    ):
        super().__init__()
        check_io_shape(num_classes, in_channels)
        check_number("data.image_size", image_size, 1, whole=True)
        self.num_classes = num_classes
        self.priors = priors_of_scales(priors, len(self.strides), image_size)
        self.add_layers(in_channels, lambda channels: max(1, round(channels * width)))
        self._draw(gamma_init)

    def add_layers(self, in_channels: int, w: Callable[[int], int]) -> None:
        """Add the layers; `w` gives the width of one that has so many channels in the paper."""
        raise NotImplementedError

    @property
    def out_channels(self) -> int:
        """Channels of every output."""
        return len(self.priors[0]) * (NUMBERS + self.num_classes)

    def _draw(self, gamma_init: float) -> None:
        """Draw fresh weights, as the other networks do; a prediction begins as unlikely to hold an object."""
        initialise(self, gamma_init)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:  # the outputs alone have one
                bias = module.bias.detach().view(len(self.priors[0]), -1)
                bias[:, NUMBERS - 1] = -math.log((1 - LIKELY) / LIKELY)

    def check_size(self, images: Tensor) -> None:
        """Raise ConfigError unless the images divide into cells."""
        height, width = images.shape[-2:]
        if height % self.strides[0] or width % self.strides[0]:
            raise ConfigError(
                f"this network takes images whose sides are multiples of {self.strides[0]} pixels, got {height}x{width}: "
                "set data.image_size to one; data=boxes letterboxes images of any shape to it"
            )

    def loss(self, outputs: list[Tensor], targets: list[dict[str, Tensor]], size: tuple[int, int]) -> dict[str, Tensor]:
        """Return the parts of the training loss, see `yolo_loss`; `size` of the images is that of the outputs' grids."""
        return yolo_loss(outputs, targets, self.priors, self.strides)

    def layout(self) -> dict[str, Any]:
        """Return what the raw outputs of two networks have in common where they mean the same."""
        return {"classes": self.num_classes, "strides": self.strides, "priors": self.priors}

    def distilled(
        self, outputs: list[Tensor], teacher: list[Tensor], size: tuple[int, int], temperature: float
    ) -> dict[str, Tensor]:
        """Return the parts of the loss against the raw outputs of another network, see `yolo_distillation`."""
        student, other = (predictions(raw, self.priors, self.strides) for raw in (outputs, teacher))
        return yolo_distillation(student, other, temperature)

    def decoded(self, outputs: list[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return all boxes (N, P, 4) in pixels and their scores (N, P, num_classes) in [0, 1]."""
        found = predictions(outputs, self.priors, self.strides)
        return found.boxes(), found.scores()

    def detections(self, outputs: list[Tensor], size: tuple[int, int]) -> list[Detections]:
        """Return what was found in every image."""
        return choose(*self.decoded(outputs, size), size)


def scaled(priors: Sequence[tuple[float, float]], image_size: int) -> list[tuple[float, float]]:
    """Return priors of 416 pixels for images of another size."""
    return [(w * image_size / PAPER_SIZE, h * image_size / PAPER_SIZE) for w, h in priors]


def priors_of_scales(
    priors: Sequence[Sequence[float]], scales: int, image_size: int
) -> tuple[tuple[tuple[float, float], ...], ...]:
    """Share priors out over the scales, the largest to the coarsest.

    Raises:
        ConfigError: not pairs of numbers above 0 that images of this size can hold, or not as many for every scale.
    """
    advice = f"give {scales} x n pairs [width, height] in pixels, or null for the paper's"
    if not priors or len(priors) % scales or any(len(pair) != 2 for pair in priors):
        raise ConfigError(f"model.priors={priors} do not fit the {scales} scales of this network: {advice}")
    for pair in priors:
        for number in pair:
            check_number("each number of model.priors", number, 0, image_size, above=True)
    ordered = sorted(((float(w), float(h)) for w, h in priors), key=lambda pair: pair[0] * pair[1])
    each = len(ordered) // scales
    return tuple(tuple(ordered[i * each : (i + 1) * each]) for i in reversed(range(scales)))


def upsampled(coarse: Tensor, fine: Tensor) -> Tensor:
    """Double a tensor's rows and columns, and join the channels of a finer one to it."""
    return torch.cat((nn.functional.interpolate(coarse, scale_factor=2.0, mode="nearest"), fine), 1)
