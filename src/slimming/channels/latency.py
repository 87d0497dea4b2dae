"""A latency asked for: a table proposes which channels go, and the time of the whole network corrects it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slimming.channels.criteria import Choice, Criterion
from slimming.channels.knapsack import Knapsack, LayerTimes, Picked
from slimming.channels.plan import PruningPlan
from slimming.errors import GraphError, check_number

if TYPE_CHECKING:
    from slimming.channels.graph.deciding import Settling

STEP = 8  # channels; onnxruntime and oneDNN compute in blocks of 8 or 16
TOLERANCE = 0.04  # of what is asked for
ACCEPTED = 0.08  # where the widths allow nothing nearer
MOST_TRIES = 10
FURTHER = 0.95  # of the least time by the table that was tried


@dataclass(frozen=True)
class Try:
    """A choice that was measured: the share of the dense network's time by the table, and of the whole network."""

    picked: Picked
    measured: float

    @property
    def table(self) -> float:
        return self.picked.share


class Latency(Criterion):
    """The channels that keep the most score while the network takes a share of the dense network's time.

    Args:
        share: in (0, 1), of the dense network's time.
        times: of every layer, over its widths.
        measure: gives the share of the dense network's time that the whole network of a plan takes.
        asked: what a plan records beside the share: the engine, and how it is timed.
        step: kept channels are multiples of it.
        additive: as Knapsack takes it.
        tolerance: of the share, as a share of it.
    """

    def __init__(
        self,
        share: float,
        times: Mapping[str, LayerTimes],
        measure: Callable[[PruningPlan], float],
        asked: Mapping[str, Any] | None = None,
        step: int = STEP,
        additive: bool = False,
        tolerance: float = TOLERANCE,
    ) -> None:
        check_number("budget.latency", share, 0, 1, above=True, below=True)
        self.share, self.times, self.measure, self.asked = share, times, measure, dict(asked or {})
        self.step, self.additive, self.tolerance = step, additive, tolerance
        self.tries: list[Try] = []
        self.left: Tensor | None = None  # (all gammas,) bool, which are gone in any case

    def describe(self) -> dict[str, Any]:
        return {"criterion": "Latency", "latency": self.share} | self.asked

    def search(self, choice: Choice, settling: "Settling", plan_of: Callable[[Tensor], PruningPlan]) -> Tensor:
        """Correct what is asked of the table until the whole network takes the share of the time.

        Returns:
            The units that go, (U,) bool.

        Raises:
            GraphError: unreachable; the message gives the nearest that can be reached.
        """
        knapsack = Knapsack(choice, settling, self.times, self.step, self.additive)
        left = self._left(choice)
        self.tries = []
        aim = self.share
        while len(self.tries) < MOST_TRIES:
            picked = knapsack.pick(aim)
            if self._known(picked):
                picked = self._between(knapsack) or self._beyond(knapsack) or picked
            if self._known(picked):
                break  # the widths allow nothing between two that were measured
            self.tries.append(Try(picked, self.measure(plan_of(picked.removed | left))))
            if self._off(self.tries[-1]) <= self.tolerance:
                return picked.removed | left
            aim = self._next_aim()
        nearest = min(self.tries, key=self._off)
        if self._off(nearest) <= ACCEPTED:
            return nearest.picked.removed | left
        raise GraphError(self._refusal(knapsack, nearest))

    def _left(self, choice: Choice) -> Tensor:
        """Return the units (U,) all of whose gammas are gone in any case."""
        if self.left is None:
            return torch.zeros(len(choice.score), dtype=torch.bool)
        gone = self.left[choice.gammas].to(choice.size.dtype)
        return torch.zeros_like(choice.size).index_add_(0, choice.unit, gone) == choice.size

    def _known(self, picked: Picked) -> bool:
        return any(picked.removed.equal(tried.picked.removed) for tried in self.tries)

    def _between(self, knapsack: Knapsack) -> Picked | None:
        """Return what lies half way, by the table, between the nearest tries on both sides; None without both."""
        above = min((t for t in self.tries if t.measured > self.share), key=lambda t: t.measured, default=None)
        below = max((t for t in self.tries if t.measured <= self.share), key=lambda t: t.measured, default=None)
        if above is None or below is None:
            return None
        return knapsack.between(above.picked, below.picked, (above.table + below.table) / 2)

    def _beyond(self, knapsack: Knapsack) -> Picked | None:
        """Return what the table puts a little below all tries, where all were too slow; None else."""
        if any(t.measured <= self.share for t in self.tries):
            return None
        return knapsack.pick(FURTHER * min(t.table for t in self.tries))

    def _off(self, tried: Try) -> float:
        return abs(tried.measured / self.share - 1)

    def _next_aim(self) -> float:
        """Return what to ask of the table next: on the line through the nearest tries, or the dense network, around it."""
        above = [(1.0, 1.0), *((t.table, t.measured) for t in self.tries if t.measured > self.share)]
        below = [(t.table, t.measured) for t in self.tries if t.measured <= self.share]
        x1, y1 = min(above, key=lambda point: (point[1], point[0]))
        if below:
            x0, y0 = max(below, key=lambda point: (point[1], -point[0]))
            if not x0 < x1:  # noise has swapped them
                return (x0 + x1) / 2
            part = (self.share - y0) / (y1 - y0)
            return x0 + min(max(part, 0.1), 0.9) * (x1 - x0)
        slope = (1 - y1) / (1 - x1) if x1 < 1 and y1 < 1 else 0.0
        aim = 1 - (1 - self.share) / slope if slope > 0 else 0.0
        return min(max(aim, x1 / 2), 0.98 * x1) if x1 > 0.02 else 0.0

    def _refusal(self, knapsack: Knapsack, nearest: Try) -> str:
        reached = f"the nearest of {len(self.tries)} measured networks takes {nearest.measured:.3f} of the dense time"
        if nearest.measured > self.share and nearest.table <= knapsack.least.share + 1e-9:
            return (
                f"budget.latency={self.share} cannot be reached: with everything removed that may go, "
                f"{nearest.measured:.3f} of the dense latency remain; raise the budget, loosen min_channels, max_layer_ratio "
                f"or round_to (kept channels are multiples of {self.step}), or try ties=apart"
            )
        return (
            f"budget.latency={self.share} is not met: {reached}; raise or lower the budget, or let widths be finer by "
            f"round_to (kept channels are multiples of {self.step}) and loosen min_channels and max_layer_ratio"
        )
