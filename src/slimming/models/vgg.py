"""VGG for small images, with BatchNorm; a plain chain of 3x3 convolutions."""

from collections.abc import Sequence

import torch
from torch import nn

from slimming.errors import ConfigError, check_choice, check_number
from slimming.models.init import check_io_shape, initialise

WIDTHS = {  # 'M' is a 2x2 max pooling
    11: [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512],
    13: [64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512],
    16: [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512],
    19: [64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4],
}


def conv_stack(widths: Sequence[int | str], in_channels: int) -> nn.Sequential:
    """Chain conv 3x3 (no bias), BatchNorm, ReLU for every width and a 2x2 max pooling for every 'M'.

    Raises:
        ConfigError: an entry is neither 'M' nor a whole number >= 1, or there is no convolution.
    """
    layers: list[nn.Module] = []
    for width in widths:
        if width == "M":
            layers.append(nn.MaxPool2d(2))
            continue
        check_number("each entry of model.widths that is not 'M'", width, 1, whole=True)
        layers += [
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        in_channels = width
    if not any(isinstance(layer, nn.Conv2d) for layer in layers):
        raise ConfigError(f"model.widths must hold at least one convolution, got {list(widths)}")
    return nn.Sequential(*layers)


class VGG(nn.Module):
    """`feature` (the conv stack), global average pooling, `classifier` (one linear layer).

    Shape: (N, in_channels, H, W) with H, W >= 16 (2 per pooling) -> (N, num_classes).
    """

    def __init__(self, widths: Sequence[int | str], num_classes: int, in_channels: int, gamma_init: float):
        super().__init__()
        check_io_shape(num_classes, in_channels)
        self.feature = conv_stack(widths, in_channels)
        self.classifier = nn.Linear([w for w in widths if w != "M"][-1], num_classes)
        initialise(self, gamma_init)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.feature(x).mean((2, 3)))  # (N, C, H, W) -> (N, C) -> (N, num_classes)


def vgg(
    depth: int = 19,
    width: float = 1.0,
    widths: Sequence[int | str] | None = None,
    num_classes: int = 10,
    in_channels: int = 3,
    gamma_init: float = 0.5,
) -> VGG:
    """Build VGG-11/13/16/19; `width` multiplies every layer, `widths` replaces them all.

    Source: Network Slimming section 4.2 (VGG-19 for CIFAR: 16 convolutions, one linear layer).
    Raises:
        ConfigError: a value out of range.
    """
    check_choice("model.depth", depth, WIDTHS)
    check_number("model.width", width, 0, above=True)
    if widths is None:
        widths = [w if w == "M" else max(1, round(w * width)) for w in WIDTHS[depth]]
    elif width != 1:
        raise ConfigError(f"model.width={width} and model.widths exclude each other: give one of them")
    return VGG(widths, num_classes, in_channels, gamma_init)
