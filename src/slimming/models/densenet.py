"""DenseNet with basic blocks and without compression, for small images."""

import torch
from torch import nn
from torch.nn import functional as F

from slimming.errors import ConfigError, check_number
from slimming.models.init import check_io_shape, initialise


class DenseLayer(nn.Module):
    """BN-ReLU-3x3, concatenated to the input: C -> C + growth channels."""

    def __init__(self, in_channels: int, growth: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, growth, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((x, self.conv1(F.relu(self.bn1(x)))), 1)


class Transition(nn.Module):
    """BN-ReLU-1x1 at full width, then 2x2 average pooling."""

    def __init__(self, channels: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x))), 2)


class DenseNet(nn.Module):
    """Three dense stages with two transitions, depth = 3n + 4; BatchNorm, ReLU, global average pooling, linear.

    Shape: (N, in_channels, H, W) with H, W >= 4 -> (N, num_classes).
    """

    def __init__(
        self, depth: int, growth: int, init_channels: int, num_classes: int, in_channels: int, gamma_init: float
    ):
        super().__init__()
        check_io_shape(num_classes, in_channels)
        self.conv1 = nn.Conv2d(in_channels, init_channels, 3, padding=1, bias=False)
        channels, stages = init_channels, []
        for stage in range(3):
            layers = []
            for _ in range((depth - 4) // 3):
                layers.append(DenseLayer(channels, growth))
                channels += growth
            stages.append((f"dense{stage + 1}", nn.Sequential(*layers)))
            if stage < 2:
                stages.append((f"trans{stage + 1}", Transition(channels)))
        for name, module in stages:
            self.add_module(name, module)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self, gamma_init)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.trans1(self.dense1(self.conv1(x)))  # (N, C, H / 2, W / 2)
        x = self.dense3(self.trans2(self.dense2(x)))  # (N, C', H / 4, W / 4)
        return self.fc(F.relu(self.bn(x)).mean((2, 3)))  # (N, num_classes)


def densenet(
    depth: int = 40,
    growth: int = 12,
    init_channels: int = 16,
    num_classes: int = 10,
    in_channels: int = 3,
    gamma_init: float = 0.5,
) -> DenseNet:
    """Build a DenseNet of `depth` = 3n + 4; 16 initial channels is the paper's count, 24 the PyTorch reference's.

    Source: Huang et al., arXiv:1608.06993; Network Slimming section 4.2 (DenseNet-40, growth 12).
    Raises:
        ConfigError: a value out of range.
    """
    check_number("model.depth", depth, 7, whole=True)
    if (depth - 4) % 3:
        raise ConfigError(f"model.depth must be 3n + 4 (7, 10, ... 22, ... 40), got {depth}")
    check_number("model.growth", growth, 1, whole=True)
    check_number("model.init_channels", init_channels, 1, whole=True)
    return DenseNet(depth, growth, init_channels, num_classes, in_channels, gamma_init)
