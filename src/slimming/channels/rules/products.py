"""Rules of products of two activations: matrix products and attention."""

from torch import Tensor

from slimming.channels.atoms import broadcast, frozen, varying
from slimming.channels.rules.call import Call
from slimming.channels.tape import Product, Tape, UnsupportedOperator


def matmul(tape: Tape, call: Call) -> Tensor:
    """A product of batches of matrices sums over channels, or carries the channels of one factor.

    Rows (..., M, K) times columns (..., K, N). Summed over K, the channels of both factors are tied and needed unless one
    of them is zero. Channels along N are carried: their K summands are all zero together.
    """
    left, right = call.args[:2]
    a, b = call.atoms_or_frozen(left), call.atoms_or_frozen(right)
    if left.ndim < 3 or left.shape[:-2] != right.shape[:-2]:
        raise UnsupportedOperator("its factors are not batches of matrices")
    ndim, macs = left.ndim, call.out.numel() * left.shape[-1]
    axis_a, axis_b = _matrix_axis(tape, a), _matrix_axis(tape, b)
    if axis_a == ndim - 1 and axis_b == ndim - 2:
        _sum_over_channels(tape, a, b.transpose(-1, -2), macs)
        return frozen(ndim)
    if axis_a is None and axis_b == ndim - 1:
        tape.products.append(Product(b.reshape(-1), macs // b.numel(), sums=False))
        return b
    if axis_b is None and axis_a == ndim - 2:
        tape.products.append(Product(a.reshape(-1), macs // a.numel(), sums=False))
        return a
    raise UnsupportedOperator("its channels are neither summed over by both factors nor carried by one")


def attention(tape: Tape, call: Call) -> Tensor:
    """scaled_dot_product_attention: queries and keys keep their channels unless the scale is given, since it counts them."""
    query, key, value = (call.atoms_or_frozen(t) for t in call.args[:3])
    ndim = call.args[0].ndim
    if any(_matrix_axis(tape, t) not in (None, ndim - 1) for t in (query, key, value)):
        raise UnsupportedOperator("its channels lie along another axis than the last")
    pairs = call.args[0].shape[-2] * call.args[1].shape[-2] * call.args[0][..., 0, 0].numel()
    if call.kwargs.get("scale") is None:
        for atoms in (query, key):
            tape.freeze(atoms, "scaled_dot_product_attention: its scale counts the channels of queries and keys")
        tape.other_macs += pairs * call.args[0].shape[-1]
    else:
        _sum_over_channels(tape, query, key, pairs * call.args[0].shape[-1])
    tape.products.append(Product(value.reshape(-1), pairs * call.args[2].shape[-1] // value.numel(), sums=False))
    return value


def _sum_over_channels(tape: Tape, a: Tensor, b: Tensor, macs: int) -> None:
    """Note a product that sums over the channels of both factors, which are tied."""
    tied = tape.derived("any", broadcast(a.shape, b.shape), [a, b])
    tape.products.append(Product(tied.reshape(-1), macs // tied.numel(), sums=True))


def _matrix_axis(tape: Tape, atoms: Tensor) -> int | None:
    """Return the axis of a batch of matrices along which channels may go: one of the last two, and all of it, or none."""
    axes, flexible = varying(atoms), tape.flexible(atoms)
    last = {atoms.ndim - 1, atoms.ndim - 2}
    if 0 in axes or (flexible is not None and (flexible not in last or last & set(axes) != {flexible})):
        raise UnsupportedOperator("its channels do not lie along one side of its matrices")
    return flexible
