"""Arrays of atoms: which channels an activation carries.

Every activation has an array of atoms with as many axes as the activation itself. It is kept compact: an axis along which
the atoms do not change has size 1, all others have the activation's size. Atom 0 is frozen: network inputs, constants, and
everything that an unsupported operator wrote.
"""

import torch
from torch import Tensor

FROZEN = 0


def frozen(ndim: int) -> Tensor:
    """Return the atoms of an activation of `ndim` axes of which no channel may go."""
    return torch.full((1,) * ndim, FROZEN)


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


def rows_along(atoms: Tensor, axis: int) -> Tensor:
    """Return the atoms as a grid (rows, n) whose second axis is `axis`."""
    return atoms.movedim(axis, -1).reshape(-1, atoms.shape[axis])


def along(atoms: Tensor, axis: int, ndim: int) -> Tensor:
    """Return atoms (C,) as the compact atoms of an activation of `ndim` axes whose channels lie along `axis`."""
    return atoms.view([-1 if i == axis % ndim else 1 for i in range(ndim)])


def broadcast(*shapes: torch.Size) -> torch.Size:
    """Return the shape to which all of these are broadcast."""
    if all(shape == shapes[0] for shape in shapes):
        return shapes[0]
    shape: torch.Size = torch.broadcast_shapes(*shapes)
    return shape


def components(count: int, ties: list[Tensor]) -> Tensor:
    """Return for each of `count` atoms the smallest atom of its component; (2, n) ties connect them.

    Union-find by hooking and pointer jumping, vectorised: a loop over pairs takes half a minute on DenseNet-121.
    """
    label = torch.arange(count)
    if not ties:
        return label
    a, b = torch.cat(ties, 1)
    while True:
        la, lb = label[a], label[b]
        apart = la != lb
        if not bool(apart.any()):
            return label
        a, b, la, lb = a[apart], b[apart], la[apart], lb[apart]
        low = torch.minimum(la, lb)
        new = label.scatter_reduce(0, la, low, "amin").scatter_reduce(0, lb, low, "amin")
        while not torch.equal(new, jumped := new[new]):
            new = jumped
        label = new
