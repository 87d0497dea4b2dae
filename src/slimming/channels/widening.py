"""Where zero channels have to be added so that layers get the widths that an engine likes.

Pruning shows that the channels of a component may go together; so another channel like it may stand beside it, everywhere at
once. Whatever reads such a *clone* multiplies it by zero, so that a network with clones computes the same. This file finds how
many clones of which components a network needs; `embedding` makes that network.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from slimming.channels.graph import ChannelGraph
from slimming.channels.graph.structure import Step
from slimming.channels.layers import SelectBatchNorm
from slimming.errors import PlanError

MODES = ("select", "full")  # what becomes of a SelectBatchNorm
PADDED = ("conv", "transposed", "depthwise", "grouped")  # layers whose widths count for the block
ROUNDS = 20  # of padding and aligning; chains of BatchNorms need a few
WIDEST = 4  # times its old width that a tensor may get; a cycle of BatchNorms would grow for ever


class Sides(NamedTuple):
    """The tensors before and after a BatchNorm, and where its channels lie in them.

    Attributes:
        source, target: (C,) components of the whole tensors.
        select, scatter: (k,) for each channel of the BatchNorm its position in source and target.
    """

    source: Tensor
    target: Tensor
    select: Tensor
    scatter: Tensor


class Widening:
    """How many clones stand before and after every component.

    Args:
        graph: of the thin network.
        modes: by the name of a SelectBatchNorm `full` for one that shall read and write whole tensors.
    """

    def __init__(self, graph: ChannelGraph, modes: Mapping[str, str]) -> None:
        self.graph = graph
        self.before = torch.zeros(graph.tape.count, dtype=torch.long)
        self.after = torch.zeros(graph.tape.count, dtype=torch.long)
        self.norms = {name: self._sides(step) for name, step in graph.layers.items() if step.use.kind == "norm"}
        selecting = {name for name in self.norms if isinstance(graph.modules[name], SelectBatchNorm)}
        self.aligned = [name for name in self.norms if name not in selecting or modes.get(name) == "full"]
        self.fixed = self._find_fixed([name for name in self.norms if name not in selecting])

    def _sides(self, step: Step) -> Sides:
        use, module = step.use, self.graph.modules[step.use.name]
        assert use.source is not None and use.target is not None
        source, target = self.graph.component[use.source], self.graph.component[use.target]
        positions = []
        for side, whole in (("select", source), ("scatter", target)):
            index = getattr(module, side, None)
            positions.append(torch.arange(len(whole)) if index is None else index.cpu())
        return Sides(source, target, *positions)

    def _find_fixed(self, plain: list[str]) -> Tensor:
        """Return (atoms,) bool, components that cannot have clones.

        Frozen ones; those over which products sum; single channels, which may be spread over all of another tensor; and those
        of which different channels lie side by side, which halves of a tensor do as well as groups of channels: where a
        clone would have to stand is then not known.
        """
        fixed = self.graph.frozen.clone()
        for side in (side for use in self.graph.tape.uses for side in use.sides()):
            of = self.graph.component[side]
            fixed[of] |= len(of) == 1
            fixed[of[1:][(of[1:] == of[:-1]) & (side[1:] != side[:-1])]] = True
        for product in self.graph.tape.products:
            fixed[self.graph.component[product.atoms]] |= product.sums
        count = -1
        while count != (count := int(fixed.count_nonzero())):
            for name in plain:
                source, target, _, _ = self.norms[name]
                either = fixed[source] | fixed[target]
                fixed[source[either]] = True
                fixed[target[either]] = True
        return fixed

    def entries(self, components: Tensor) -> Tensor:
        """Return what a tensor of these components holds now: (C',) its old positions in order, -1 for clones."""
        if not len(components):
            return components
        start = torch.cat((torch.tensor([True]), components[1:] != components[:-1])).nonzero().flatten()
        length = torch.diff(
            start, append=torch.tensor([len(components)])
        )  # of runs of one component, cloned as a whole
        first = components[start]
        before, after = self.before[first] * length, self.after[first] * length
        shift = (before + torch.cat((after.new_zeros(1), after[:-1]))).cumsum(0).repeat_interleave(length)
        found = torch.full((len(components) + int((before + after).sum()),), -1)
        found[torch.arange(len(components)) + shift] = torch.arange(len(components))
        return found

    def solve(self, block: int) -> None:
        """Add clones until widths are multiples of `block`, where they can be, and every aligned BatchNorm fits.

        Raises:
            Misfit: it cannot be done with this BatchNorm aligned.
        """
        self._align()
        for _ in range(ROUNDS):
            changed = self._pad(block, outputs=True) | self._align()
            if not (changed | self._pad(block, outputs=False) | self._align()):
                return

    # --- widths ---------------------------------------------------------------------------------------------------------

    def _pad(self, block: int, outputs: bool) -> bool:
        """Pad what convolutions write (or read) to multiples of the block; return whether that changed anything."""
        changed = False
        for step in self.graph.steps:
            if step.use.kind in PADDED:
                changed |= self._pad_side(step.writes if outputs else step.reads, block)
        return changed

    def _pad_side(self, side: Tensor, block: int) -> bool:
        width = len(self.entries(side))
        if width % block == 0 or bool(self.fixed[side].any()):
            return False
        last = side[-1]
        each = int((side == last).count_nonzero())
        short = -width % block
        if short % math.gcd(each, block):
            return False
        self.after[last] += next(m for m in range(1, block + 1) if (short - m * each) % block == 0)
        return True

    # --- BatchNorms -----------------------------------------------------------------------------------------------------

    def _align(self) -> bool:
        """Add clones until the channels of every aligned BatchNorm have the same positions before and after it."""
        changed = False
        for _ in range(ROUNDS * len(self.norms)):
            if not any([self._align_norm(name) for name in self.aligned]):
                return changed
            changed = True
        raise Misfit(next(n for n in reversed(self.aligned) if self._align_norm(n)))

    def _align_norm(self, name: str) -> bool:
        sides = self.norms[name]
        lacks = self.gaps(sides.source, sides.select) - self.gaps(sides.target, sides.scatter)
        if not bool(lacks.any()):
            return False
        for components, position, lack in (
            (sides.target, sides.scatter, lacks),
            (sides.source, sides.select, -lacks),
        ):
            self._fill(name, components, components[position], lack.clamp(min=0))
            if len(self.entries(components)) > WIDEST * max(len(sides.source), len(sides.target)) + 64:
                raise Misfit(name)
        return True

    def gaps(self, components: Tensor, position: Tensor) -> Tensor:
        """Return (k + 1,) how many channels lie before, between and after those at k old positions of a tensor."""
        entries = self.entries(components)
        new = torch.empty_like(components)
        new[entries[entries >= 0]] = (entries >= 0).nonzero().flatten()
        ends = torch.tensor([-1]), torch.tensor([len(entries)])
        return torch.diff(torch.cat((ends[0], new[position], ends[1]))) - 1

    def _fill(self, name: str, components: Tensor, paired: Tensor, lack: Tensor) -> None:
        """Add clones to gaps of a tensor: before its first paired channel, or after the one in front of the gap."""
        for clones, where, more in ((self.before, paired[:1], lack[:1]), (self.after, paired, lack[1:])):
            where, more = where[more > 0], more[more > 0]
            if bool(self.fixed[where].any()):
                raise Misfit(name)
            for component in where.unique().tolist():
                wanted = int(more[where == component].max())
                clones[component] += -(-wanted // _run_length(components, component))


def _run_length(components: Tensor, component: int) -> int:
    """Return how often a component occurs in a row where it first occurs: its clones stand behind the whole run."""
    different = (components[int((components == component).nonzero()[0, 0]) :] != component).nonzero()
    return int(different[0, 0]) if len(different) else int((components == component).count_nonzero())


class Misfit(PlanError):
    """A BatchNorm cannot read and write whole tensors."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the tensors before and after {name} cannot be made to match")
        self.name = name


def widen(graph: ChannelGraph, block: int, full: Iterable[str]) -> tuple[Widening, list[str]]:
    """Find the clones that a network needs.

    Args:
        graph: of the thin network.
        block: of which widths shall be multiples.
        full: names of SelectBatchNorms that shall read and write whole tensors.

    Returns:
        The clones, and the names of those that do; the others cannot.

    Raises:
        Misfit: not even without these.
    """
    names = list(full)
    while True:
        widening = Widening(graph, dict.fromkeys(names, "full"))
        try:
            widening.solve(block)
            return widening, names
        except Misfit as misfit:
            if not names:
                raise
            names = [name for name in names if misfit.name in names and name != misfit.name]
