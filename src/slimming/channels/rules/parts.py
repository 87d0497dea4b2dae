"""Rules of operators that take parts of a tensor."""

from torch import Tensor

from slimming.channels.atoms import compress, rows_along, varying
from slimming.channels.rules.call import Call
from slimming.channels.rules.written_sizes import follow_size, is_settable
from slimming.channels.sizes import match
from slimming.channels.tape import Tape, UnsupportedOperator


def chunk(tape: Tape, call: Call) -> list[Tensor]:
    """Equal parts: the same positions of every part stay, so that the parts stay equal."""
    axis = call.axis(2)
    if axis not in varying(call.x):
        return [call.x] * len(call.out)
    if call.args[0].shape[axis] % len(call.out) or tape.flexible(call.x) != axis:
        raise UnsupportedOperator("its parts are not equal")
    return _equal_parts(tape, call.x, len(call.out), axis)


def _equal_parts(tape: Tape, atoms: Tensor, count: int, axis: int) -> list[Tensor]:
    parts = list(atoms.chunk(count, axis))
    for part in parts[1:]:
        tape.tie(parts[0], part)
    return parts


def split(tape: Tape, call: Call) -> list[Tensor]:
    """Parts whose sizes follow their channels where the sizes come from attributes; equal parts stay equal."""
    axis = call.axis(2)
    if axis not in varying(call.x):
        return [call.x] * len(call.out)
    if call.name == "tensor_split" or tape.flexible(call.x) != axis:
        raise UnsupportedOperator("it splits channels at positions written into forward")
    lengths = [part.shape[axis] for part in call.out]
    if isinstance(call.args[1], int) and len(set(lengths)) == 1:
        parts = _equal_parts(tape, call.x, len(lengths), axis)
        size = match(lengths[:1], call.sizes)[0]
        follow_size(tape, size, rows_along(parts[0], axis)[0], f"a split into parts of {lengths[0]}")
        return parts
    sizes = match(lengths, call.sizes)
    if not all(map(is_settable, sizes)):
        raise UnsupportedOperator("it splits channels at positions written into forward")
    parts = list(call.x.split(lengths, axis))
    for part, size in zip(parts, sizes, strict=True):
        follow_size(tape, size, rows_along(part, axis)[0], f"a split into parts of {lengths}")
    return parts


def unbind(tape: Tape, call: Call) -> list[Tensor]:
    axis = call.axis(1)
    if axis not in varying(call.x):
        return [call.x.squeeze(axis)] * len(call.out)
    if axis == tape.flexible(call.x):
        raise UnsupportedOperator("it takes channels apart")
    return [compress(part) for part in call.x.unbind(axis)]


def select(tape: Tape, call: Call) -> Tensor:
    """One position along space or along an axis that keeps all of its positions."""
    axis = call.axis(1)
    if axis not in varying(call.x):
        return call.x.squeeze(axis)
    if axis == tape.flexible(call.x):
        raise UnsupportedOperator("it selects one channel")
    return compress(call.x.select(axis, call.arg(2, "index")))


def slice_channels(tape: Tape, call: Call) -> Tensor:
    """A slice along space, or of channels up to or from a position that comes from an attribute."""
    axis = call.axis(1)
    start, end, step = call.arg(2, "start") or 0, call.arg(3, "end"), call.arg(4, "step", 1)
    n = call.args[0].shape[axis]
    bounds = [bound for bound in (start, n if end is None else end) if 0 != bound < n]
    if axis not in varying(call.x) or not (bounds or step != 1):
        return call.x
    sizes = match(bounds, call.sizes)
    if step != 1 or tape.flexible(call.x) != axis or not all(map(is_settable, sizes)):
        raise UnsupportedOperator("it slices channels at positions written into forward")
    row = rows_along(call.x, axis)[0]
    for bound, size in zip(bounds, sizes, strict=True):
        follow_size(tape, size, row[:bound], f"a slice at channel {bound}")
    return compress(call.func(call.x, axis, start, n if end is None else end))
