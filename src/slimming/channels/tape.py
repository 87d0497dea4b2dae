"""What one watched forward pass writes down: atoms, ties, zeros and the uses of layers.

An *atom* is an int that stands for one channel of one activation. Every activation has an array of atoms, kept compact: as
many axes as the activation, each of them full or of size 1 where the atoms do not change along it. Atom 0 is frozen: network
inputs, constants, and everything an unknown operator wrote.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FROZEN = 0


class Unknown(Exception):
    """Raised by a rule that cannot prove what an operator does; the message says why."""


@dataclass
class Use:
    """One use of a layer with weights.

    Attributes:
        kind: conv, transposed, linear, depthwise, grouped or norm.
        name: of the layer in the network.
        read: (C_in,) atoms of the input the weights see (after the selection of a SelectBatchNorm).
        write: (C_out,) atoms of the output (before its placement).
        groups: of a convolution.
        positions: how often the weights are applied; MACs are positions * kernel * C_in * C_out / groups.
        kernel: elements of the kernel.
        source, target: for a norm: (C,) atoms of the whole tensor it reads from and writes to.
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


@dataclass
class Zero:
    """When atoms `out` carry zero: `all` or `any` of the rows of `operands` do, or their `gamma` is pruned, or `always`."""

    when: str
    out: Tensor
    operands: Tensor | None = None
    layer: str = ""


class Tape:
    """Collects what the rules find out; see the module's docstring."""

    def __init__(self):
        self.count = 1  # atom 0 is FROZEN
        self.ties: list[Tensor] = []  # (2, n) pairs that must have the same place
        self.frozen: list[tuple[Tensor, str]] = []
        self.doubtful: list[tuple[Tensor, str]] = []  # safe only if sizes written into forward follow the channels
        self.zeros: list[Zero] = []
        self.uses: list[Use] = []
        self.sources: dict[str, Tensor] = {}  # what a SelectBatchNorm selects from, until it runs
        self.other_macs = 0  # of products of activations, which pruning does not change

    def mark(self) -> tuple[int, ...]:
        """Return a point to rewind to."""
        lists = (self.ties, self.frozen, self.doubtful, self.zeros, self.uses)
        return (self.count, self.other_macs, *map(len, lists))

    def rewind(self, mark: tuple[int, ...]) -> None:
        """Forget what was written after `mark`."""
        self.count, self.other_macs, *lengths = mark
        for entries, length in zip(
            (self.ties, self.frozen, self.doubtful, self.zeros, self.uses), lengths, strict=True
        ):
            del entries[length:]

    def fresh(self, shape: Sequence[int]) -> Tensor:
        """Return new atoms of a compact shape."""
        n = int(torch.Size(shape).numel())
        atoms = torch.arange(self.count, self.count + n).view(tuple(shape))
        self.count += n
        return atoms

    def tie(self, a: Tensor, b: Tensor) -> None:
        if a is b:
            return
        a, b = torch.broadcast_tensors(a, b)
        pairs = torch.stack((a.reshape(-1), b.reshape(-1)))
        self.ties.append(pairs[:, pairs[0] != pairs[1]])

    def freeze(self, atoms: Tensor, reason: str) -> None:
        self.frozen.append((atoms.reshape(-1), reason))

    def use(self, use: Use) -> None:
        """Note a use; the atoms of a layer used before are tied to those of its first use."""
        for other in self.uses:
            if other.name == use.name:
                self.tie(other.read, use.read)
                self.tie(other.write, use.write)
                if use.source is not None:
                    self.tie(other.source, use.source)
                break
        self.uses.append(use)

    def derived(self, when: str, shape: Sequence[int], operands: Sequence[Tensor]) -> Tensor:
        """Return new atoms tied to all operands, zero when `all` or `any` (or `never`) of them are."""
        out = self.fresh(shape)
        rows = [o.expand(out.shape).reshape(-1) for o in operands]
        for row in rows:
            self.tie(out.view(-1), row)
        if when != "never":
            self.zeros.append(Zero(when, out.view(-1), torch.stack(rows)))
        return out


def compress(atoms: Tensor) -> Tensor:
    """Shrink every axis along which the atoms do not change to size 1."""
    for axis in range(atoms.ndim):
        if atoms.shape[axis] > 1:
            first = atoms.narrow(axis, 0, 1)
            if atoms.stride(axis) == 0 or torch.equal(atoms, first.expand_as(atoms)):
                atoms = first
    return atoms


def varying(atoms: Tensor) -> list[int]:
    """Return the axes along which compact atoms change."""
    return [axis for axis, size in enumerate(atoms.shape) if size > 1]
