"""Scores that are read off the weights: no data needed. Each is (all gammas,) float64."""

import torch
from torch import Tensor

from slimming.channels.graph.structure import Structure
from slimming.errors import GraphError


def gamma(graph: Structure) -> Tensor:
    """Return |gamma|.

    Raises:
        GraphError: one is not finite.
    """
    gammas = torch.cat([n.module.weight.detach().abs().double().cpu() for n in graph.norms.values()])
    if not bool(gammas.isfinite().all()):
        name = next(name for name, n in graph.norms.items() if not bool(gammas[n.all].isfinite().all()))
        raise GraphError(f"the scales of {name} are not finite: take a checkpoint from before that happened")
    return gammas


def lamp(graph: Structure) -> Tensor:
    """Return gamma^2 over the sum of gamma^2 from it upwards in its BatchNorm's order; 0 where all of these are 0.

    The largest gamma of every BatchNorm scores 1, so that no layer empties before the others.

    Source: Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021, arXiv:2010.07611, equation 4, of
    weights; here of gammas.
    """
    squares, found = gamma(graph).square(), torch.zeros(graph.count, dtype=torch.float64)
    for norm in graph.norms.values():
        ordered, order = squares[norm.all].sort(stable=True)
        upwards = ordered.flip(0).cumsum(0).flip(0)
        found[norm.start + order] = torch.where(upwards > 0, ordered / upwards, 0.0)
    return found


def random(graph: Structure, seed: int) -> Tensor:
    """Return numbers in [0, 1): what any score has to beat."""
    return torch.rand(graph.count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight_l1(graph: Structure) -> Tensor:
    """Return for every gamma the L1 norm of all filters that write what it scales."""
    mass = torch.zeros(graph.tape.count, dtype=torch.float64)
    for name, step in graph.layers.items():
        if step.use.kind in ("conv", "linear", "grouped", "transposed"):
            own = graph.modules[name].weight if name in graph.modules else graph.model.get_parameter(name)
            assert isinstance(own, Tensor)
            weight, axis = own.detach().abs().double().cpu(), 1 if step.use.kind == "transposed" else 0
            mass.index_add_(0, step.writes, weight.sum([i for i in range(weight.ndim) if i != axis]))
    return torch.cat([mass[graph.layers[name].reads] for name in graph.norms])
