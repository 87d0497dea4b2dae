"""Small networks to export, with statistics as a training leaves them."""

import torch
from torch import nn

import slimming
from slimming.deploy.capturing import Network
from slimming.records import Record


def trained(model: nn.Module) -> nn.Module:
    """Give every BatchNorm scales, shifts and statistics of its own."""
    torch.manual_seed(0)
    for norm in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine):
        nn.init.uniform_(norm.weight, 0.2, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
        nn.init.normal_(norm.running_mean, std=0.2)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return model.eval()


def pruned(model: nn.Module, image: tuple[int, int, int], ties: str = "together", ratio: float = 0.5) -> nn.Module:
    graph = slimming.trace(model, torch.zeros(1, *image))
    return slimming.prune(model, graph.plan(slimming.GlobalRatio(ratio), ties=ties)).eval()


def network(model: nn.Module, image: tuple[int, int, int]) -> Network:
    return Network(model, image, Record(None))


class Residual(nn.Module):
    """The smallest network whose pruning selects and scatters: a BatchNorm on each arm of a sum and one behind it."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.arm = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.norm, self.head = nn.BatchNorm2d(width), nn.Linear(width, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.norm(x + self.arm(x)).relu().mean((2, 3)))
