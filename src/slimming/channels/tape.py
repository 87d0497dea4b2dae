"""The tape: what the rules write down about one watched forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimming.channels.atoms import compress, rows_along, varying
from slimming.channels.sizes import Resize, Size

CARRYING = ("depthwise", "scale")  # layers that need their inputs no more than what reads their outputs does
WITH_FILTERS = ("conv", "transposed", "linear", "depthwise", "grouped")  # one for every channel that a layer writes


class UnsupportedOperator(Exception):
    """A rule cannot prove what an operator does; the message says why."""


@dataclass
class Use:
    """One use of a layer with weights.

    Attributes:
        kind: conv, transposed, linear, depthwise, grouped, norm or scale (a parameter with one number per channel).
        name: of the layer in the network.
        read: (C_in,) atoms of the input that the weights see (after the selection of a SelectBatchNorm).
        write: (C_out,) atoms of the output (before the scatter of a SelectBatchNorm).
        groups: of a convolution.
        positions: how often the weights are applied; MACs are positions * kernel * C_in * C_out / groups.
        kernel: elements of the kernel.
        source, target: for a norm: (C,) atoms of the whole tensor that it reads from and of the one that it writes to.
        bias: whether the layer adds one.
    """

    kind: str
    name: str
    read: Tensor
    write: Tensor
    groups: int = 1
    positions: int = 0
    kernel: int = 1
    source: Tensor | None = None
    target: Tensor | None = None
    bias: bool = False

    def sides(self) -> list[Tensor]:
        """Return all atoms that the layer touches."""
        return [side for side in (self.read, self.write, self.source, self.target) if side is not None]


@dataclass
class Zero:
    """When the atoms `out` are zero.

    If `all` or `any` rows of `operands` are, if their `gamma` is pruned, `always`, or (beside another reason) if the `filter`
    and the bias that write them are zero.
    """

    when: str
    out: Tensor
    operands: Tensor | None = None
    layer: str = ""


@dataclass
class Product:
    """A product of two activations. It either sums over channels or carries the channels of one factor.

    Attributes:
        atoms: (n,) channels that are summed over (zero where a factor is) or carried.
        macs: multiply-accumulates per channel.
        sums: whether the channels are summed over; the product then needs them unless they are zero.
    """

    atoms: Tensor
    macs: int
    sums: bool


class Tape:
    """Collects what the rules find out; the package's docstring explains the words."""

    def __init__(self) -> None:
        self.count = 1  # atom 0 is FROZEN
        self.ties: list[Tensor] = []  # (2, n) pairs of atoms that stay or go together
        self.frozen: list[tuple[Tensor, str]] = []
        self.doubtful: list[tuple[Tensor, str]] = []  # safe only if sizes written into forward follow the channels
        self.resizes: list[Resize] = []  # sizes in attributes that have to follow the channels
        self.axes: list[Tensor] = []  # (n,) atoms along an axis whose size the network's code asked for
        self.fixed: dict[str, str] = {}  # norms that stay whole, and why
        self.zeros: list[Zero] = []
        self.uses: list[Use] = []
        self.first_uses: dict[str, Use] = {}  # by name
        self.products: list[Product] = []
        self.sources: dict[str, Tensor] = {}  # what a SelectBatchNorm selects from, until it runs
        self.other_macs = 0  # of what no rule resizes
        self.row = torch.zeros(
            0, dtype=torch.long
        )  # per atom: an atom of the first row that it is tied to, see `flexible`

    def mark(self) -> tuple[int, ...]:
        """Return a point to rewind to."""
        return (self.count, self.other_macs, *map(len, self._lists()))

    def _lists(self) -> tuple[list[Any], ...]:
        return self.ties, self.frozen, self.doubtful, self.resizes, self.zeros, self.uses, self.products

    def rewind(self, mark: tuple[int, ...]) -> None:
        """Forget what was written after `mark`."""
        self.count, self.other_macs, *lengths = mark
        for entries, length in zip(self._lists(), lengths, strict=True):
            del entries[length:]
        self.first_uses = {use.name: use for use in reversed(self.uses)}

    def fresh(self, shape: Sequence[int]) -> Tensor:
        """Return new atoms of a compact shape."""
        n = int(torch.Size(shape).numel())
        atoms = torch.arange(self.count, self.count + n).view(tuple(shape))
        self.count += n
        return atoms

    def tie(self, a: Tensor, b: Tensor) -> None:
        if a is b:
            return
        if a.shape != b.shape:
            a, b = torch.broadcast_tensors(a, b)
        self.ties.append(torch.stack((a.reshape(-1), b.reshape(-1))))

    def freeze(self, atoms: Tensor, reason: str) -> None:
        self.frozen.append((atoms.reshape(-1), reason))

    def doubt(self, atoms: Tensor, reason: str) -> None:
        self.doubtful.append((atoms.reshape(-1), reason))

    def resize(self, size: Size, atoms: Tensor, reason: str) -> None:
        """Let an attribute follow the number of these atoms; where two sizes are one, their atoms are tied."""
        atoms = atoms.reshape(-1)
        for other in self.resizes:
            if other.size.made_of == size.made_of and other.size == size:
                self.tie(other.atoms, atoms)
                break
        self.resizes.append(Resize(size, atoms, reason))

    def rows(self, atoms: Tensor) -> Tensor:
        """Return for every atom the one of the first row that has the same position along the flexible axis."""
        if len(self.row) < self.count:
            self.row = torch.cat((self.row, torch.arange(len(self.row), self.count)))
        return self.row[atoms]

    def flexible(self, atoms: Tensor, wanted: int | None = None) -> int | None:
        """Return the axis along which channels may go; None where the atoms do not change.

        Atoms that change along several axes are tied so that they stay rectangular: along all of those axes but one
        (`wanted`, by default the last, unless earlier ties say otherwise) the same positions stay everywhere, so that
        only one axis gets shorter.
        """
        axes = varying(atoms)
        if len(axes) < 2:
            return axes[0] if axes else None
        known = varying(compress(self.rows(atoms)))
        if len(known) == 1:
            return known[0]
        axis = axes[-1] if wanted is None else wanted
        grid = rows_along(atoms, axis)
        self.tie(grid[:1], grid[1:])
        self.row[grid] = self.row[grid[:1]].expand_as(grid).clone()
        return axis

    def inherit(self, out: Tensor, source: Tensor) -> None:
        """Let new atoms have the rows that the atoms they are tied to have; both of one shape."""
        if len(varying(out)) > 1:
            _, same = self.rows(source).reshape(-1).unique(return_inverse=True)
            flat, first = out.reshape(-1), torch.full((int(same.max()) + 1,), len(same))
            first = first.scatter_reduce(0, same, torch.arange(len(same)), "amin")
            self.rows(out)
            self.row[flat] = flat[first[same]]

    def use(self, use: Use) -> None:
        """Note a use; the atoms of a layer that was used before are tied to those of its first use."""
        first = self.first_uses.setdefault(use.name, use)
        if first is not use:
            self.tie(first.read, use.read)
            self.tie(first.write, use.write)
            if first.source is not None and use.source is not None:
                self.tie(first.source, use.source)
        self.uses.append(use)
        if use.kind in WITH_FILTERS:
            self.zeros.append(Zero("filter", use.write, layer=use.name))

    def derived(self, when: str, shape: Sequence[int], operands: Sequence[Tensor]) -> Tensor:
        """Return new atoms tied to all operands; they are zero when `all` or `any` (or `never`) of the operands are."""
        out = self.fresh(shape)
        rows = [o.expand(out.shape).reshape(-1) for o in operands]
        for row in rows:
            self.tie(out.view(-1), row)
        self.inherit(out, rows[0].view(out.shape))
        if when != "never":
            self.zeros.append(Zero(when, out.view(-1), torch.stack(rows)))
        return out
