"""Sizes that forward writes into an operator: they must follow the channels that they count, or stay."""

from typing import TypeGuard

import torch
from torch import Tensor

from slimming.channels.atoms import FROZEN
from slimming.channels.sizes import Size, axes_of
from slimming.channels.tape import Tape


def is_settable(size: Size | None) -> TypeGuard[Size]:
    """Return whether a size is made of attributes alone."""
    return size is not None and not axes_of(size)


def follow_size(tape: Tape, size: Size | None, atoms: Tensor, what: str) -> None:
    """Let a size follow the atoms that it counts: a new attribute value, or a size that forward reads from a shape."""
    if is_settable(size):
        tape.resize(size, atoms, f"{what}, from attributes")
        return
    others = [tape.axes[i] for i in axes_of(size)]
    for other in others:  # the size of another tensor's axis: both must stay equally long
        if len(other) == len(atoms) and not torch.equal(other.sort().values, atoms.sort().values):
            tape.tie(other, atoms)
    tape.doubt(torch.cat((atoms, *others)), f"{what} that may be written into forward")


def keep_size(tape: Tape, size: Size, what: str) -> None:
    """Keep a size of an axis from which no channel goes; where it was read from another tensor's axis, that is doubtful."""
    if is_settable(size):
        tape.resize(size, torch.full((int(size),), FROZEN), f"{what}, from attributes")
    for i in axes_of(size):
        if len(tape.axes[i]):
            tape.doubt(tape.axes[i], f"{what} along an axis that keeps its size")
