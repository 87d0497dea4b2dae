"""Which channels go: a criterion turns the scores of units into a mask. A unit is a class of tied gammas, or one gamma."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimming.errors import ConfigError, GraphError, check_choice, check_number


@dataclass
class Choice:
    """What a criterion chooses from.

    Attributes:
        gammas: (N,) indices of the candidate gammas among all gammas, in the order of the layers.
        unit: (N,) unit of each.
        score: (U,) float64 per unit.
        size: (U,) gammas per unit.
        layer: (N,) index of each gamma's BatchNorm.
    """

    gammas: Tensor
    unit: Tensor
    score: Tensor
    size: Tensor
    layer: Tensor

    def weakest(self, count: int) -> Tensor:
        """Return the mask of the fewest units, weakest first and equal ones in order, with at least `count` gammas."""
        order = self.score.argsort(stable=True)
        before = self.size[order].cumsum(0) - self.size[order]
        removed = torch.zeros(len(self.score), dtype=torch.bool)
        removed[order[before < count]] = True
        return removed


class Criterion:
    """Base: subclasses give `choose(choice) -> (U,) bool`, True = removed."""

    def choose(self, choice: Choice) -> Tensor:
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Return the criterion's name and values, as a plan records what was asked."""
        return {"criterion": type(self).__name__} | {k: v for k, v in vars(self).items() if v is not None}


class GlobalRatio(Criterion):
    """The share `ratio` of all candidate gammas, weakest first (the paper, section 3).

    Args:
        ratio: in [0, 1). Of N gammas floor(ratio * N + 1e-9) go; where classes are tied, at least that many.
        convention: `exact`, or `reference`: the public codes' threshold sort(|gamma|)[int(N * ratio)], kept strictly above.
    """

    def __init__(self, ratio: float, convention: str = "exact"):
        check_number("ratio", ratio, 0, 1, below=True)
        check_choice("convention", convention, ("exact", "reference"))
        self.ratio, self.convention = ratio, convention

    def choose(self, choice: Choice) -> Tensor:
        n = len(choice.gammas)
        if self.convention == "reference":
            threshold = choice.score[choice.unit].sort().values[int(n * self.ratio)]
            return choice.score <= threshold
        return choice.weakest(int(self.ratio * n + 1e-9))


class PerLayerRatio(Criterion):
    """The share `ratio` of every BatchNorm's candidates; a class tied over several layers counts for its first."""

    def __init__(self, ratio: float):
        check_number("ratio", ratio, 0, 1, below=True)
        self.ratio = ratio

    def choose(self, choice: Choice) -> Tensor:
        removed = torch.zeros(len(choice.score), dtype=torch.bool)
        for units in _by_layer(choice):
            order = units[choice.score[units].argsort(stable=True)]
            removed[order[: int(self.ratio * len(units) + 1e-9)]] = True
        return removed


class Threshold(Criterion):
    """All units with a score <= `threshold`, which is >= 0."""

    def __init__(self, threshold: float):
        check_number("threshold", threshold, 0)
        self.threshold = threshold

    def choose(self, choice: Choice) -> Tensor:
        return choice.score <= self.threshold


class OptimalThreshold(Criterion):
    """Per layer the weakest units whose squared scores add up to at most `delta` of the layer's sum.

    Source: Ye et al., Channel Pruning via Optimal Thresholding, arXiv:2003.04566, equation 5; delta 1e-3.
    """

    def __init__(self, delta: float = 1e-3):
        check_number("delta", delta, 0, 1)
        self.delta = delta

    def choose(self, choice: Choice) -> Tensor:
        removed = torch.zeros(len(choice.score), dtype=torch.bool)
        for units in _by_layer(choice):
            order = units[choice.score[units].argsort(stable=True)]
            share = choice.score[order].square().cumsum(0)
            removed[order[share <= self.delta * share[-1]]] = True
        return removed


class Budget(Criterion):
    """As few of the weakest units as it takes.

    Args:
        macs, params: the share in (0, 1] of the dense cost that may remain; give one of them.
    """

    def __init__(self, macs: float | None = None, params: float | None = None):
        if (macs is None) == (params is None):
            raise ConfigError("a budget needs exactly one of macs and params, the share that may remain")
        check_number("budget.macs" if params is None else "budget.params", macs or params, 0, 1, above=True)
        self.macs, self.params = macs, params

    def search(self, choice: Choice, cost_share: Callable[[Tensor], dict[str, float]]) -> Tensor:
        """Bisect the number of removed units by the analytic cost.

        Returns:
            The fewest units whose removal meets the budget.

        Raises:
            GraphError: unreachable; the message gives the best that can be reached.
        """
        key, limit = ("macs", self.macs) if self.macs is not None else ("params", self.params)
        assert limit is not None
        order = choice.score.argsort(stable=True)

        def removed(count: int) -> Tensor:
            mask = torch.zeros(len(order), dtype=torch.bool)
            mask[order[:count]] = True
            return mask

        def fits(count: int) -> bool:
            return cost_share(removed(count))[key] <= limit + 1e-12

        low, high = 0, len(order)
        if not fits(high):
            best = cost_share(removed(high))[key]
            raise GraphError(
                f"budget.{key}={limit} cannot be reached: with everything removed that may go, {best:.4f} of the dense "
                f"{key} remain; raise the budget, loosen min_channels, max_layer_ratio or round_to, or try ties=apart"
            )
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle + 1, high)
        return removed(low)


def _by_layer(choice: Choice) -> list[Tensor]:
    """Return the units of every layer; a unit of several layers belongs to its first."""
    first = torch.full((len(choice.score),), 2**31).scatter_reduce(0, choice.unit, choice.layer, "amin")
    return [(first == layer).nonzero().flatten() for layer in first.unique()]
