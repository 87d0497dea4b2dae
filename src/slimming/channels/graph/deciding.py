"""From scores to a choice, and from what a criterion chose to what the constraints restore."""

from typing import NamedTuple

import torch
from torch import Tensor

from slimming.channels.criteria import Choice
from slimming.channels.graph.aligned import Aligned
from slimming.channels.graph.liveness import Solution, solve
from slimming.channels.graph.remaining import component_macs
from slimming.channels.graph.structure import Structure
from slimming.channels.options import PlanOptions
from slimming.errors import GraphError


def check_scores(graph: Structure, values: Tensor, free: Tensor) -> Tensor:
    """Return the scores (all gammas,), 0 where they do not matter.

    Raises:
        GraphError: one of the candidates `free` (all gammas,) bool has none.
    """
    for name, norm in graph.norms.items():
        if not bool((values.isfinite() | ~free)[norm.all].all()):
            raise GraphError(
                f"{name} has channels without a finite score: leave it whole by ignore=['{name}'], or take another score"
            )
    return torch.where(free, values, values.nan_to_num(0.0, 0.0, 0.0))


def make_choice(graph: Structure, free: Tensor, classes: Tensor, values: Tensor, reduce: str) -> Choice:
    """Gather candidates into units.

    Args:
        free: (all gammas,) bool, the candidates.
        classes: (all gammas,) gammas of one class are one unit.
        values: (all gammas,) scores.
        reduce: `max`, `mean` or `sum` of the scores of a unit.
    """
    gammas = free.nonzero().flatten()
    _, unit = classes[gammas].unique(return_inverse=True)
    # Units are numbered by their first gamma, so that equal scores keep the order of the layers.
    first = torch.full((int(unit.max()) + 1,), len(unit)).scatter_reduce(0, unit, torch.arange(len(unit)), "amin")
    unit = first.argsort().argsort()[unit]
    score = torch.zeros(len(first), dtype=torch.float64).scatter_reduce(
        0, unit, values[gammas], {"max": "amax"}.get(reduce, reduce), include_self=False
    )
    return Choice(gammas, unit, score, unit.bincount(), graph.norm_of[gammas])


def unit_macs(graph: Structure, choice: Choice) -> Tensor:
    """Return the MACs of everything that reads or writes the channels of a unit, in the dense network, (U,) float64, >= 1."""
    unit, slot = torch.stack((choice.unit, graph.slots[choice.gammas])).unique(
        dim=1
    )  # a channel that several write: once
    macs = torch.zeros_like(choice.score).index_add_(0, unit, component_macs(graph)[slot])
    return macs.clamp_min(1)


class Part(NamedTuple):
    """Gammas that are counted together: `low` of them stay at least, and as many as make a multiple of `round_to`, or all."""

    gammas: Tensor
    low: int
    round_to: int

    def missing(self, kept: Tensor) -> int:
        """Return how many more have to stay than `kept` (all gammas,) bool keeps."""
        have = int(kept[self.gammas].count_nonzero())
        wanted = -(-max(have, self.low) // self.round_to) * self.round_to
        return min(len(self.gammas), wanted) - have


class Settling:
    """Restores channels, the strongest first, until the constraints hold and no layer has an empty side.

    Args:
        graph: the network; an Aligned one, where what lives must keep all of its gammas.
        values: (all gammas,) scores.
        choice: what the criterion chose from.
        options: holds the constraints.
    """

    def __init__(self, graph: Structure, values: Tensor, choice: Choice, options: PlanOptions) -> None:
        self.graph, self.values, self.choice, self.options = graph, values, choice, options
        self.unit_of = torch.full((graph.count,), -1)
        self.unit_of[choice.gammas] = choice.unit
        self.strength = self._strength()
        self.parts = self._parts()

    def outcome(self, removed: Tensor) -> Solution:
        """Return what stays when the units `removed` (U,) bool are asked to go."""
        kept = torch.ones(self.graph.count, dtype=torch.bool)
        kept[self.choice.gammas] = ~removed[self.choice.unit]
        forced = torch.zeros(self.graph.tape.count, dtype=torch.bool)
        while True:
            solution = solve(self.graph, kept, forced)
            if self._restore_living(solution, kept):
                continue
            if not self._restore_gammas(solution, kept, forced) and not self._restore_sides(solution, forced):
                return Solution(solution.live[self.graph.component], solution.kept)

    def _restore_living(self, solution: Solution, kept: Tensor) -> bool:
        """Keep all gammas of the classes that live, if classes go as a whole; return whether that was anything."""
        halved = solution.live[self.graph.slots] & ~kept
        if not isinstance(self.graph, Aligned) or not bool(halved.any()):
            return False
        kept[halved] = True
        return True

    def _restore_gammas(self, solution: Solution, kept: Tensor, forced: Tensor) -> bool:
        """Restore what the constraints want of every part; return whether that was anything."""
        short, stays = False, solution.kept.clone()
        for part in self.parts:
            missing = part.missing(stays)
            if missing > 0:
                short = True
                back = torch.where(stays[part.gammas], -1.0, self.values[part.gammas]).topk(missing).indices
                gammas = part.gammas[back]
                units = self.unit_of[gammas]
                tied = self.choice.gammas[torch.isin(self.choice.unit, units[units >= 0])]
                kept[gammas] = kept[tied] = True
                forced[self.graph.slots[gammas]] = True
                if isinstance(self.graph, Aligned):  # what comes back here may be enough for the next part
                    stays[gammas] = stays[tied] = True
        return short

    def _parts(self) -> list[Part]:
        """Return what the constraints count: every BatchNorm; rounded are, where classes go as a whole, their bands."""
        options, parts = self.options, []
        rounded = 1 if isinstance(self.graph, Aligned) else options.round_to
        for norm in self.graph.norms.values():
            size = norm.module.num_features
            low = max(options.min_channels, size - int(options.max_layer_ratio * size + 1e-9))
            gammas = torch.arange(norm.all.start, norm.all.stop)
            parts.append(Part(gammas, low, rounded))
        if isinstance(self.graph, Aligned) and options.round_to > 1:
            parts += [Part(gammas, 0, options.round_to) for gammas in self.graph.bands()]
        return parts

    def _restore_sides(self, solution: Solution, forced: Tensor) -> bool:
        """Force the strongest component of every side of which nothing lives to live; return whether there was any."""
        short = False
        for step, counts in zip(self.graph.steps, self.graph.count_sides(solution.live), strict=True):
            for side, count in zip((step.reads, step.writes), counts, strict=True):
                if step.use.kind != "norm" and not count:
                    forced[side[self.strength[side].argmax()]] = True
                    short = True
        return short

    def _strength(self) -> Tensor:
        """Return the largest score of a gamma that writes or reads a component, (atoms,)."""
        strength = torch.zeros(self.graph.tape.count, dtype=torch.float64)
        for name, norm in self.graph.norms.items():
            step = self.graph.layers[name]
            for side in (step.writes, step.reads):
                strength.scatter_reduce_(0, side, self.values[norm.all], "amax")
        return strength
