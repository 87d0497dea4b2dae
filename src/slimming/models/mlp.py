"""A multi-layer perceptron with BatchNorm1d."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from slimming.errors import check_number
from slimming.models.init import check_io_shape, initialise


class MLP(nn.Module):
    """Linear (no bias), BatchNorm1d, ReLU per hidden layer, then a linear layer.

    Shape: (N, in_channels, H, W) -> (N, num_classes); images of another size are resized to `image_size` first.
    """

    def __init__(self, widths: Sequence[int], image_size: int, num_classes: int, in_channels: int, gamma_init: float):
        super().__init__()
        check_io_shape(num_classes, in_channels)
        self.image_size = image_size
        layers: list[nn.Module] = []
        features = in_channels * image_size**2
        for width in widths:
            check_number("each entry of model.widths", width, 1, whole=True)
            layers += [nn.Linear(features, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
            features = width
        self.feature = nn.Sequential(*layers)
        self.classifier = nn.Linear(features, num_classes)
        initialise(self, gamma_init)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-2:] != (self.image_size, self.image_size):
            x = F.interpolate(x, (self.image_size, self.image_size), mode="bilinear", antialias=True)
        return self.classifier(self.feature(x.flatten(1)))


def mlp(
    widths: Sequence[int] = (500, 300),
    image_size: int = 28,
    num_classes: int = 10,
    in_channels: int = 1,
    gamma_init: float = 0.5,
) -> MLP:
    """Build the paper's 784-500-300-10 network (section 4.2, MNIST).

    Raises:
        ConfigError: a value out of range.
    """
    check_number("model.image_size", image_size, 1, whole=True)
    return MLP(widths, image_size, num_classes, in_channels, gamma_init)
