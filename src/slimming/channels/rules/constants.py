"""Rules of operators whose result does not depend on the values of the activation that they are called on."""

from torch import Tensor

from slimming.channels.atoms import frozen, varying
from slimming.channels.rules.call import Call
from slimming.channels.rules.written_sizes import keep_size
from slimming.channels.sizes import match
from slimming.channels.tape import Tape, UnsupportedOperator


def new_constant(tape: Tape, call: Call) -> Tensor:
    """A tensor of given sizes, of which only device and type come from the activation."""
    sizes: list[int] = call.args[1]
    for size in match(sizes, call.sizes):
        if size is not None:
            keep_size(tape, size, f"{call.name} of sizes {list(map(int, sizes))}")
    return frozen(call.out.ndim)


def meshgrid(tape: Tape, call: Call) -> list[Tensor]:
    """Coordinates, spread over axes of their own."""
    if any(varying(atoms) for tensor in call.args[0] if (atoms := call.atoms_of(tensor)) is not None):
        raise UnsupportedOperator("it spreads channels over an axis")
    return [frozen(tensor.ndim) for tensor in call.out]
