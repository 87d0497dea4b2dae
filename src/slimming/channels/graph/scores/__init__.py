"""What channels are ranked by: a score for every gamma; the lowest go first."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slimming.channels.graph.scores import reconstruction, weights
from slimming.channels.graph.structure import Structure
from slimming.errors import ConfigError, check_choice

Given = Mapping[str, Tensor | Sequence[float]]  # layer -> scores (C,)
NAMED = {
    "gamma": lambda graph, seed, batches: weights.gamma(graph),
    "lamp": lambda graph, seed, batches: weights.lamp(graph),
    "reconstruction": lambda graph, seed, batches: reconstruction.reconstruction(graph, batches),
    "random": lambda graph, seed, batches: weights.random(graph, seed),
    "weight_l1": lambda graph, seed, batches: weights.weight_l1(graph),
}


def score_gammas(graph: Structure, score: str | Given, seed: int = 0, batches: Iterable[Any] = ()) -> Tensor:
    """Return a score per gamma, (all gammas,) float64; see ChannelGraph.scores."""
    weights.gamma(graph)  # whatever the score: a network that is not finite is not pruned
    if not isinstance(score, str):
        return _given(graph, score)
    check_choice("score", score, NAMED)
    return NAMED[score](graph, seed, batches)


def _given(graph: Structure, given: Given) -> Tensor:
    if unknown := [name for name in given if name not in graph.norms]:
        known = ", ".join([*graph.norms][:8])
        raise ConfigError(f"score: {unknown[0]!r} is no BatchNorm with scales; there are {known}")
    found = torch.full((graph.count,), torch.nan, dtype=torch.float64)
    for name, values in given.items():
        norm, scores = graph.norms[name], torch.as_tensor(values).detach().double().cpu()
        if scores.shape != (norm.module.num_features,):
            raise ConfigError(f"score: {name} needs {norm.module.num_features} numbers, got {list(scores.shape)}")
        found[norm.all] = scores
    return found
