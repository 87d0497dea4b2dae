"""Pre-activation ResNet with bottleneck blocks, for small images."""

import torch
from torch import nn
from torch.nn import functional as F

from slimming.errors import ConfigError, check_number
from slimming.models.init import check_io_shape, initialise

EXPANSION = 4


class Bottleneck(nn.Module):
    """BN-ReLU-1x1, BN-ReLU-3x3, BN-ReLU-1x1, added to the input (or to its 1x1 projection)."""

    def __init__(self, in_channels: int, planes: int, stride: int = 1):
        super().__init__()
        out_channels = planes * EXPANSION
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out_channels, 1, bias=False)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        out = self.conv3(F.relu(self.bn3(out)))
        return out + (x if self.downsample is None else self.downsample(x))


class PreResNet(nn.Module):
    """Three stages of n bottlenecks, depth = 9n + 2; a final BatchNorm and ReLU, global average pooling, linear.

    Shape: (N, in_channels, H, W) -> (N, num_classes).
    """

    def __init__(self, depth: int, width: float, num_classes: int, in_channels: int, gamma_init: float):
        super().__init__()
        check_io_shape(num_classes, in_channels)
        stem, *planes = (max(1, round(c * width)) for c in (16, 16, 32, 64))
        self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
        channels = stem
        for stage, p in enumerate(planes):
            blocks = []
            for block in range((depth - 2) // 9):
                blocks.append(Bottleneck(channels, p, 2 if stage > 0 and block == 0 else 1))
                channels = p * EXPANSION
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self, gamma_init)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))  # (N, 256 * width, H / 4, W / 4)
        return self.fc(F.relu(self.bn(x)).mean((2, 3)))  # (N, num_classes)


def preresnet(
    depth: int = 164, width: float = 1.0, num_classes: int = 10, in_channels: int = 3, gamma_init: float = 0.5
) -> PreResNet:
    """Build a pre-activation ResNet of `depth` = 9n + 2 (20, 56, 110, 164).

    Source: He et al., arXiv:1603.05027; Network Slimming section 4.2.
    Raises:
        ConfigError: a value out of range.
    """
    check_number("model.depth", depth, 11, whole=True)
    if (depth - 2) % 9:
        raise ConfigError(f"model.depth must be 9n + 2 (11, 20, 29, ... 164), got {depth}")
    check_number("model.width", width, 0, above=True)
    return PreResNet(depth, width, num_classes, in_channels, gamma_init)
