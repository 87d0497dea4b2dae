"""Other penalties on BatchNorm scales than the paper's, and the door to all of them: `make_penalty`."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimming.channels.graph.streams import streams
from slimming.channels.options import PenaltyOptions, check_penalty
from slimming.channels.penalty import Penalty, batchnorm_gammas
from slimming.channels.trace import trace
from slimming.errors import ConfigError


class Proximal(Penalty):
    """The same penalty as a soft threshold after every step: gamma <- sign(gamma) * max(|gamma| - lr * sparsity, 0).

    What the loss does not hold becomes exactly zero. No momentum carries the shrinkage on: where SGD's momentum is m, an
    equally strong subgradient needs only (1 - m) * sparsity.

    Source: Ye et al., Rethinking the Smaller-Norm-Less-Informative Assumption in Channel Pruning of Convolution Layers, ICLR
    2018, arXiv:1802.00124, section 4.1 (ISTA).
    """

    def add_gradient(self, factor: float | Tensor = 1.0) -> None:
        """Add nothing."""

    def after_step(self, gammas: list[Tensor], lr: float) -> None:
        threshold = lr * self.sparsity
        inside = torch._foreach_clamp_max(gammas, threshold)  # gamma - clamp(gamma, -threshold, threshold)
        torch._foreach_clamp_min_(inside, -threshold)
        torch._foreach_sub_(gammas, inside)

    def reach(self, lr_sum: float, momentum: float | None) -> float:
        return lr_sum

    def describe(self) -> str:
        return "by a soft threshold after every step"


class Polarization(Penalty):
    """sparsity * (t * sum |gamma| - sum |gamma - mean gamma|), which pushes gammas to 0 or away from it.

    After every step the gammas are clamped to [0, 1]: outside, the penalty is unbounded below. The mean is over all penalised
    gammas. By itself the penalty is least where the share (t + 2) / 4 of them is 0 and the rest is 1.

    Args:
        t: in [-2, 2]; the larger, the more gammas go to 0.

    Source: Zhuang et al., Neuron-level Structured Pruning using Polarization Regularizer, NeurIPS 2020, equation 2.
    """

    moves = "a gamma by at most"

    def __init__(self, gammas: dict[str, nn.Parameter], sparsity: float, t: float = 1.0) -> None:
        super().__init__(gammas, sparsity)
        self.t = t

    def slopes(self, gammas: list[Tensor]) -> list[Tensor]:
        flat = self._all(gammas)
        side = (flat - flat.mean()).sign()
        slopes = self.t * flat.sign() - side + side.mean()  # the last term: every gamma moves the mean
        return _like(gammas, slopes[: len(flat) - self.removed])

    def after_step(self, gammas: list[Tensor], lr: float) -> None:
        torch._foreach_clamp_min_(gammas, 0.0)
        torch._foreach_clamp_max_(gammas, 1.0)

    @torch.no_grad()
    def value(self) -> Tensor:
        flat = self._all(list(self.gammas.values()))
        apart = (flat - flat.sum() / max(1, len(flat))).abs().sum()
        return (self.t * flat.abs().sum() - apart) * self.sparsity

    def _all(self, gammas: list[Tensor]) -> Tensor:
        """Return all gammas in one row, zeros for those that have left the network."""
        return functional.pad(_joined(gammas), (0, self.removed))

    def reach(self, lr_sum: float, momentum: float | None) -> float | None:
        """Return a bound: below the mean a gamma is pulled by t + 1, and by less than 1 more where most lie above it."""
        l1 = super().reach(lr_sum, momentum)
        return None if l1 is None else (self.t + 2) * l1

    def start(self) -> float:
        return float(_joined([gamma.detach() for gamma in self.gammas.values()]).clamp(0, 1).median())

    def describe(self) -> str:
        flat = _joined([gamma.detach() for gamma in self.gammas.values()])
        outside = int(((flat < 0) | (flat > 1)).sum())
        moved = f" ({outside:,} lie outside now)" * bool(outside)
        return f"by polarization, t {self.t:g}, and clamped to [0, 1]{moved}"


class Grouped(Penalty):
    """sparsity * sum of sqrt(n) * l2 norm of each group of n gammas, so that the gammas of a group vanish together.

    The weight sqrt(n) makes a group of equal gammas as costly as the L1 penalty makes them; a gamma alone costs its size.

    Args:
        groups: (all gammas,) the group of every gamma, numbered from 0, in the order of `gammas`.

    Source: Yuan and Lin, Model selection and estimation in regression with grouped variables, 2006, section 2 (the weight).
    """

    moves = "the root mean square of a group by"

    def __init__(self, gammas: dict[str, nn.Parameter], sparsity: float, groups: Tensor) -> None:
        super().__init__(gammas, sparsity)
        self._arrange(groups, groups.bincount())

    def narrow(self, wide: Penalty, kept: Tensor) -> None:
        """Groups lose members, but no weight: a member that has left is a zero among them."""
        assert isinstance(wide, Grouped)
        super().narrow(wide, kept)
        self._arrange(wide.groups[kept], wide.sizes)

    def _arrange(self, groups: Tensor, sizes: Tensor) -> None:
        self.groups, self.sizes = groups, sizes
        counts = groups.bincount(minlength=len(sizes))
        order = groups.argsort(stable=True)
        place = torch.arange(len(groups)) - (counts.cumsum(0) - counts)[groups[order]]
        # (groups, largest size) positions of members, len(groups) where there is none: gathering sums in one order on every
        # device and rank, which adding by index does not.
        self.members = torch.full((len(sizes), int(counts.max()) if len(sizes) else 0), len(groups))
        self.members[groups[order], place] = order

    def _norms(self, flat: Tensor) -> Tensor:
        """Return (groups,) the weighted norms; their numbers follow the gammas to their device."""
        self.members, self.groups, self.sizes = (x.to(flat.device) for x in (self.members, self.groups, self.sizes))
        padded = torch.cat((flat, flat.new_zeros(1)))
        norms: Tensor = torch.linalg.vector_norm(padded[self.members], dim=1)
        return norms * self.sizes.to(flat.dtype).sqrt()

    def slopes(self, gammas: list[Tensor]) -> list[Tensor]:
        flat = _joined(gammas)
        norms = self._norms(flat)
        scale = torch.where(norms > 0, self.sizes / norms, 0.0)
        return _like(gammas, flat * scale[self.groups])

    @torch.no_grad()
    def value(self) -> Tensor:
        return self._norms(_joined(list(self.gammas.values()))).sum() * self.sparsity

    def describe(self) -> str:
        return f"in {len(self.sizes):,} groups, {int((self.sizes > 1).sum()):,} of them of several gammas"


PENALTIES: dict[str, type[Penalty]] = {
    "l1": Penalty,
    "proximal": Proximal,
    "polarization": Polarization,
    "group": Grouped,
}


def make_penalty(model: nn.Module, sparsity: float, *, example: Any = None, **options: Any) -> Penalty:
    """Return a penalty on the trainable BatchNorm scales of a network.

    Args:
        sparsity: lambda, >= 0.
        example: an input of the network; the groups of `name="group"` are found by running it.
        options: fields of PenaltyOptions, which says what they mean and allow.

    Raises:
        ConfigError: a value that is not allowed, a pattern that matches no BatchNorm, or groups without an example.
        GraphError: the network cannot be run on the example.
    """
    chosen = PenaltyOptions(**options)
    check_penalty(chosen)
    gammas = batchnorm_gammas(model, chosen.layers)
    extra: dict[str, Any] = {} if chosen.t is None else {"t": chosen.t}
    if chosen.name == "group":
        extra["groups"] = _groups(model, gammas, example)
    return PENALTIES[chosen.name](gammas, sparsity, **extra)


def _groups(model: nn.Module, gammas: dict[str, nn.Parameter], example: Any) -> Tensor:
    """Return the group of every gamma: its stream, or one of its own where the example does not reach its BatchNorm."""
    if not gammas:
        return torch.empty(0, dtype=torch.long)
    if example is None:
        raise ConfigError("penalty=group needs an example input, which tells what channels the gammas share")
    graph = trace(model, example)
    found = streams(graph)
    known = {id(norm.module.weight): found[norm.all] for norm in graph.norms.values()}
    start = graph.tape.count + graph.count  # above the numbers of streams
    parts = []
    for gamma in gammas.values():
        parts.append(known.get(id(gamma), torch.arange(start, start + len(gamma))))
        start += len(gamma)
    groups: Tensor = torch.cat(parts).unique(return_inverse=True)[1]
    return groups


def _joined(gammas: list[Any]) -> Tensor:
    """Return all gammas in one row."""
    return torch.cat(gammas) if gammas else torch.empty(0)


def _like(gammas: list[Tensor], flat: Tensor) -> list[Tensor]:
    """Cut one row into pieces as long as the gammas."""
    return list(torch.split(flat, [len(gamma) for gamma in gammas]))
