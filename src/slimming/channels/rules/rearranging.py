"""Rules of operators that move data: views, permutations, channel shuffles."""

from torch import Tensor

from slimming.channels.atoms import along, compress, rows_along, varying
from slimming.channels.rules.call import Call
from slimming.channels.rules.written_sizes import follow_size, keep_size
from slimming.channels.sizes import match
from slimming.channels.tape import Tape, UnsupportedOperator

RESHAPES = ("view", "reshape", "_unsafe_view")


def rearrange(tape: Tape, call: Call) -> Tensor:
    """Apply the same operator to the atoms, shaped like the activation."""
    call.only_first()
    full, name = call.x.expand(call.args[0].shape), call.name
    moved = full.reshape(call.out.shape) if name in RESHAPES else call.func(full, *call.args[1:], **call.kwargs)
    atoms = compress(moved)
    axis = tape.flexible(atoms)
    sizes = _written_sizes(call, name)
    if len(sizes) == atoms.ndim:
        for i, (number, size) in enumerate(zip(sizes, match(sizes, call.sizes), strict=True)):
            if axis is not None and i == axis and number != -1:
                follow_size(tape, size, rows_along(atoms, axis)[0], f"{name} to sizes {sizes}")
            elif i != axis and size is not None:
                keep_size(tape, size, f"{name} to sizes {sizes}")
    return atoms


def _written_sizes(call: Call, name: str) -> list[int]:
    """Return the sizes of all axes of the output as the operator was given them; -1 for what it works out."""
    if name in (*RESHAPES, "expand"):
        return list(call.args[1] if isinstance(call.args[1], list | tuple) else call.args[1:])
    if name == "unflatten":
        axis, sizes = call.axis(1), list(call.args[2])
        return [-1] * axis + sizes + [-1] * (call.args[0].ndim - axis - 1)
    return []


def view_as(tape: Tape, call: Call) -> Tensor:
    """A view to the shape of another tensor; both must keep equally many channels."""
    other = call.atoms_of(call.args[1])
    if other is None:
        raise UnsupportedOperator("the size of a constant")
    atoms = compress(call.x.expand(call.args[0].shape).reshape(call.out.shape))
    if varying(atoms) != varying(other) or len(varying(atoms)) > 1:
        raise UnsupportedOperator("its channels lie along another axis than those of the tensor it is shaped like")
    tape.tie(atoms, other)
    return atoms


def expand_as(tape: Tape, call: Call) -> Tensor:
    """A view spread over the space of another tensor; both must keep equally many channels."""
    x, other = call.x, call.atoms_of(call.args[1])
    if other is None:
        raise UnsupportedOperator("the size of a constant")
    x = x.view((1,) * (call.out.ndim - x.ndim) + x.shape)
    if set(varying(other)) - set(varying(x)):
        raise UnsupportedOperator("it is spread over channels")
    tape.tie(x, other)
    return x


def channel_shuffle(tape: Tape, call: Call) -> Tensor:
    """The same positions of every group stay, so that the groups stay equal."""
    atoms, groups = call.channels(call.args[0], 1), call.args[1]
    grid = atoms.view(groups, -1)
    tape.tie(grid[:1], grid[1:])
    return along(grid.T.reshape(-1), 1, call.out.ndim)
