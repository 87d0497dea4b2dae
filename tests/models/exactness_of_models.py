"""Helper: a network with several outputs, pruned at many ratios, against the masked one."""

import sys
from pathlib import Path

import torch
from torch import nn

import slimming

sys.path.append(str(Path(__file__).parents[1] / "channels"))

from exactness import assert_exact, empty_sides, randomise


def prune_everywhere(model: nn.Module, example: torch.Tensor, ties: str, ratios=(0.3, 0.6, 0.9)) -> None:
    """Check that pruned equals masked in eval and in train mode, and that no operator was unknown."""
    model, example = randomise(model).eval(), example.double()
    graph = slimming.trace(model, example, strict=True)
    for ratio in ratios:
        plan = graph.plan(slimming.GlobalRatio(ratio), ties=ties)
        assert plan.got["removed"] > 0
        assert not empty_sides(assert_exact(model, plan, example))
