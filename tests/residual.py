"""A residual network whose BatchNorms write into one stream, so that ties apart need placements."""

import torch
from torch import nn


class Residual(nn.Module):
    """(N, 3, H, W) -> (N, 5)."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.fc((x + self.bn2(self.conv2(x))).relu().mean((2, 3)))
