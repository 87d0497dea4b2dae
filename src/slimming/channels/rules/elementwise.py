"""Rules of operators that work element by element."""

import torch
from torch import Tensor

from slimming.channels.atoms import broadcast, varying
from slimming.channels.rules.call import Call
from slimming.channels.tape import Tape, UnsupportedOperator, Use, Zero


def zero_preserving(tape: Tape, call: Call) -> Tensor:
    """f(0) = 0: the output carries the atoms of the input."""
    call.only_first()
    return call.x


def not_zero_preserving(tape: Tape, call: Call) -> Tensor:
    """f(0) != 0: the output is tied to the input, but a zero channel is no longer zero."""
    call.only_first()
    return tape.derived("never", call.x.shape, [call.x])


def type_as(tape: Tape, call: Call) -> Tensor:
    """A conversion; of the second argument only the type counts."""
    return call.atoms_or_frozen(call.args[0])


def clamp(tape: Tape, call: Call) -> Tensor:
    low, high = call.arg(1, "min"), call.arg(2, "max")
    if call.name == "hardtanh":
        low, high = call.arg(1, "min_val", -1), call.arg(2, "max_val", 1)
    if any(isinstance(bound, Tensor) for bound in (low, high)):
        raise UnsupportedOperator("bounds that are tensors")
    keeps_zero = (low is None or low <= 0) and (high is None or high >= 0)
    return zero_preserving(tape, call) if keeps_zero else not_zero_preserving(tape, call)


def power(tape: Tape, call: Call) -> Tensor:
    exponent = call.args[1]
    if isinstance(exponent, Tensor) or isinstance(call.args[0], int | float):
        raise UnsupportedOperator("a power of tensors")
    return zero_preserving(tape, call) if exponent > 0 else not_zero_preserving(tape, call)


def prelu(tape: Tape, call: Call) -> Tensor:
    slopes, ndim = call.args[1], call.args[0].ndim
    if slopes.numel() > 1:
        shape = tuple(slopes.numel() if axis == 1 else 1 for axis in range(ndim))
        _note_scale(tape, call, slopes, shape, call.x)
    return zero_preserving(tape, call)


def add(tape: Tape, call: Call) -> Tensor:
    """Tie both operands; the sum is zero only where both are. The same for sub, maximum and minimum."""
    adds_nothing = any(isinstance(term, int | float) and term == 0 for term in call.args[:2])
    return _binary(tape, call, zero="all", constant_keeps_zero=adds_nothing)


def mul(tape: Tape, call: Call) -> Tensor:
    """Tie both operands; the product is zero where either is."""
    return _binary(tape, call, zero="any", constant_keeps_zero=True)


def div(tape: Tape, call: Call) -> Tensor:
    if call.atoms_of(call.args[1]) is not None:
        raise UnsupportedOperator("its divisor depends on the input")
    return mul(tape, call)


def _binary(tape: Tape, call: Call, zero: str, constant_keeps_zero: bool) -> Tensor:
    """Combine two operands.

    Args:
        zero: whether the result is zero where `all` or `any` of two activations are.
        constant_keeps_zero: whether it is zero where an activation that meets a constant is.
    """
    a, b = call.args[:2]
    x, y = call.atoms_of(a), call.atoms_of(b)
    if x is None or y is None:
        known, constant = (call.x, b) if y is None else (y, a)
        return _with_constant(tape, call, known, constant, constant_keeps_zero)
    x, y = _with_axes(x, call.out.ndim), _with_axes(y, call.out.ndim)
    if x.shape == y.shape and torch.equal(x, y):
        return x
    return _tied(tape, call, x, y, zero)


def _with_axes(atoms: Tensor, ndim: int) -> Tensor:
    """Return atoms with leading axes of size 1 up to `ndim` axes, as broadcasting adds them."""
    return atoms if atoms.ndim == ndim else atoms.view((1,) * (ndim - atoms.ndim) + atoms.shape)


def _with_constant(tape: Tape, call: Call, known: Tensor, constant: object, keeps_zero: bool) -> Tensor:
    known = _with_axes(known, call.out.ndim)
    if isinstance(constant, Tensor):
        shape = (1,) * (call.out.ndim - constant.ndim) + tuple(constant.shape)
        if any(shape[axis] > 1 for axis in varying(known)):
            _note_scale(tape, call, constant, shape, known)
    return known if keeps_zero else tape.derived("never", known.shape, [known])


def _tied(tape: Tape, call: Call, x: Tensor, y: Tensor, zero: str) -> Tensor:
    """Tie two operands with different atoms to new ones."""
    shape = broadcast(x.shape, y.shape)
    axes = {axis for axis in (tape.flexible(x), tape.flexible(y)) if axis is not None}
    if len(axes) > 1:
        raise UnsupportedOperator("its operands have channels along different axes")
    out = tape.fresh(shape)
    operands = [own.expand(shape).reshape(-1) for own in (x, y)]
    for tensor, row in zip(call.args[:2], operands, strict=True):
        full = (1,) * (call.out.ndim - tensor.ndim) + tuple(tensor.shape)
        # An operand of size 1 along the channel axis is spread over the channels: it has no position among them.
        if not axes or full[min(axes)] > 1:
            tape.tie(out.view(-1), row)
    if len(varying(out)) > 1:
        tape.inherit(out, (x if len(varying(x)) >= len(varying(y)) else y).expand(shape))
    tape.zeros.append(Zero(zero, out.view(-1), torch.stack(operands)))
    return out


def _note_scale(tape: Tape, call: Call, constant: Tensor, shape: tuple[int, ...], atoms: Tensor) -> None:
    """Note a parameter with one number per channel (layer scale); it shrinks with the channels."""
    axes = [axis for axis, size in enumerate(shape) if size > 1]
    owner = call.owner_of(constant)
    if owner is None or axes != varying(atoms):
        raise UnsupportedOperator("a constant of fixed size meets its channels")
    name = call.tensor_name(constant)
    row = atoms.reshape(-1)
    tape.use(Use("scale", name, row, row))
    if constant.is_inference():  # a view that forward makes
        tape.doubt(row, "a view of a parameter, its shape perhaps written into forward")
