"""One short rule per operator: how channels pass through it. The only place that knows operators.

A rule gets the Tape and the Call and returns the compact atoms of its output (a list for several outputs). It raises
UnsupportedOperator where it cannot prove anything; the watcher then freezes what the operator read. To add an operator, write
a rule and list it under its ATen name (without the underscore of the in-place form).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimming.channels.sizes import Given, Size, axes_of, match
from slimming.channels.tape import FROZEN, Product, Tape, UnsupportedOperator, Use, Zero, compress, rows_along, varying


@dataclass
class Call:
    """One operator call: its arguments, its result, and the atoms and layers behind tensors."""

    func: Any
    args: tuple
    kwargs: dict
    out: Any
    atoms_of: Callable[[Any], Tensor | None]  # None for what does not depend on the input
    owner_of: Callable[[Tensor | None], tuple[str, nn.Module] | None]  # layer of a parameter or buffer
    tensor_name: Callable[[Tensor], str] = str  # of a parameter or buffer in the network
    running: Sequence[nn.Module] = ()  # modules whose forward runs, the innermost last
    sizes: Given = field(default_factory=Given)  # whole numbers that the code gave, with what they are made of

    @property
    def x(self) -> Tensor:
        """Atoms of the first argument."""
        atoms = self.atoms_of(self.args[0])
        if atoms is None:
            raise UnsupportedOperator("its first argument is a constant")
        return atoms

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        return self.args[index] if len(self.args) > index else self.kwargs.get(name, default)

    def only_first(self) -> None:
        """Raise UnsupportedOperator where another argument depends on the input, too."""
        rest = [*self.args[1:], *self.kwargs.values()]
        if any(self.atoms_of(a) is not None for a in rest if isinstance(a, Tensor)):
            raise UnsupportedOperator("a second argument depends on the input")


# --- layers -----------------------------------------------------------------------------------------------------------


def _channels(call: Call, tensor: Tensor, axis: int) -> Tensor:
    """Return the atoms (C,) along `axis`; they must not change along any other."""
    atoms = call.atoms_of(tensor)
    if atoms is None:
        raise UnsupportedOperator("its input is a constant")
    axis %= tensor.ndim
    if set(varying(atoms)) - {axis}:
        raise UnsupportedOperator("its channels do not lie along one axis")
    return atoms.reshape(-1).expand(tensor.shape[axis])


def _along(atoms: Tensor, axis: int, ndim: int) -> Tensor:
    return atoms.view([-1 if i == axis % ndim else 1 for i in range(ndim)])


def _layer(call: Call, weight: Tensor, bias: Tensor | None) -> tuple[str, nn.Module]:
    owner = call.owner_of(weight)
    if owner is None or (bias is not None and (call.owner_of(bias) or ("", None))[1] is not owner[1]):
        raise UnsupportedOperator("its weight is computed or shared between modules, not owned by one")
    return owner


def convolution(tape: Tape, call: Call, transposed: bool = False) -> Tensor:
    x, weight, bias = call.args[0], call.args[1], call.arg(2, "bias")
    groups = call.arg(7 if transposed else 6, "groups", 1)
    if transposed:
        groups = call.arg(6, "groups", 1)
    name, module = _layer(call, weight, bias)
    if x.ndim != weight.ndim:
        raise UnsupportedOperator("its input has no batch axis")
    read, c_out = _channels(call, x, 1), call.out.shape[1]
    kernel = math.prod(weight.shape[2:])
    applied = x if transposed else call.out
    positions = applied.shape[0] * math.prod(applied.shape[2:])
    use = Use("transposed" if transposed else "conv", name, read, tape.fresh((c_out,)), groups, positions, kernel)
    use.bias = bias is not None
    if groups > 1:
        if not isinstance(module, nn.modules.conv._ConvNd):
            size = match([groups], call.sizes)[0]
            if groups != len(read) or not _settable(size):
                raise UnsupportedOperator(
                    "a grouped convolution outside torch.nn: its number of groups is written into forward"
                )
            tape.resize(size, read, f"a depthwise convolution of {groups} groups, from attributes")
        if groups == len(read) and not transposed:
            use.kind = "depthwise"  # output j belongs to input j // m
            tape.tie(use.write, read.repeat_interleave(c_out // groups))
            if bias is None:
                source = read.repeat_interleave(c_out // groups)
                tape.zeros.append(Zero("all", use.write, source[None]))
        elif transposed:
            raise UnsupportedOperator("a grouped transposed convolution")
        else:
            use.kind = "grouped"  # the same positions of every group stay, so that the groups stay equal
            for side in (read, use.write):
                grid = side.view(groups, -1)
                tape.tie(grid[:1], grid[1:])
    tape.use(use)
    return _along(use.write, 1, call.out.ndim)


def transposed_convolution(tape: Tape, call: Call) -> Tensor:
    return convolution(tape, call, transposed=True)


def linear(tape: Tape, call: Call) -> Tensor:
    x, weight, bias = call.args[0], call.args[1], call.arg(2, "bias")
    name, _ = _layer(call, weight, bias)
    positions = math.prod(x.shape[:-1])
    use = Use("linear", name, _channels(call, x, -1), tape.fresh((weight.shape[0],)), positions=positions)
    use.bias = bias is not None
    tape.use(use)
    return _along(use.write, -1, call.out.ndim)


def batch_norm(tape: Tape, call: Call) -> Tensor:
    x, weight, bias, mean = call.args[:4]
    owner = call.owner_of(weight if weight is not None else mean)
    if owner is None or not isinstance(owner[1], nn.modules.batchnorm._BatchNorm):
        raise UnsupportedOperator("a batch norm without a BatchNorm module")
    name, module = owner
    others = (t for t in (bias, mean, call.args[4]) if t is not None)
    if any((call.owner_of(t) or ("", None))[1] is not module for t in others):
        raise UnsupportedOperator("its weights or statistics are computed, not owned by one BatchNorm")
    if module not in call.running:
        tape.fixed[name] = "its weights are used outside of its forward"
    read = _channels(call, x, 1)
    source = tape.sources.pop(name, read)
    use = Use("norm", name, read, tape.fresh((len(read),)), source=source, bias=bias is not None)
    use.target = use.write
    if weight is not None and bias is not None:
        tape.zeros.append(Zero("gamma", use.write, layer=name))
    tape.use(use)
    return _along(use.write, 1, x.ndim)


def index_select(tape: Tape, call: Call) -> Tensor:
    """Only the selection of our SelectBatchNorm; surgery renews its indices."""
    owner = call.owner_of(call.args[2])
    if owner is None or call.args[1] != 1:
        raise UnsupportedOperator("indices that are written into forward")
    source = _channels(call, call.args[0], 1)
    tape.sources[owner[0].removesuffix(".select")] = source
    return _along(source[call.args[2].cpu()], 1, call.out.ndim)


def index_copy(tape: Tape, call: Call) -> Tensor:
    """Only the scatter of our SelectBatchNorm: it leaves zeros wherever it writes nothing."""
    out, axis, index, source = call.args
    owner = call.owner_of(index)
    if owner is None or axis != 1 or call.atoms_of(out) is not None:
        raise UnsupportedOperator("indices that are written into forward")
    target, index = tape.fresh((out.shape[1],)), index.cpu()
    empty = torch.ones(len(target), dtype=torch.bool)
    empty[index] = False
    tape.zeros.append(Zero("always", target[empty]))
    target[index] = _channels(call, source, 1)
    uses = [use for use in tape.uses if use.name == owner[0].removesuffix(".scatter")]
    uses[-1].target = target
    tape.tie(uses[0].target, target)
    return _along(target, 1, call.out.ndim)


# --- element by element -----------------------------------------------------------------------------------------------


def zero_preserving(tape: Tape, call: Call) -> Tensor:
    """f(0) = 0, element by element."""
    call.only_first()
    return call.x


def not_zero_preserving(tape: Tape, call: Call) -> Tensor:
    """f(0) != 0, element by element: the same size, but a zero is no longer zero."""
    call.only_first()
    return tape.derived("never", call.x.shape, [call.x])


def clamp(tape: Tape, call: Call) -> Tensor:
    low, high = call.arg(1, "min"), call.arg(2, "max")
    if call.func._schema.name.startswith("aten::hardtanh"):
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
        _per_channel(tape, call, slopes, shape, call.x)
    return zero_preserving(tape, call)


def _binary(tape: Tape, call: Call, zero: str, with_constant: str) -> Tensor:
    a, b = call.args[:2]
    ndim = call.out.ndim
    atoms = [call.atoms_of(t) for t in (a, b)]
    if any(x is None for x in atoms):
        known, constant = (atoms[0], b) if atoms[1] is None else (atoms[1], a)
        known = known.view((1,) * (ndim - known.ndim) + known.shape)
        if isinstance(constant, Tensor):
            shape = (1,) * (ndim - constant.ndim) + tuple(constant.shape)
            if any(shape[axis] > 1 for axis in varying(known)):
                _per_channel(tape, call, constant, shape, known)
        return known if with_constant == "carry" else tape.derived("never", known.shape, [known])
    x, y = (t.view((1,) * (ndim - t.ndim) + t.shape) for t in atoms)
    if x.shape == y.shape and torch.equal(x, y):
        return x
    shape = torch.broadcast_shapes(x.shape, y.shape)
    axes = {axis for axis in (tape.flexible(x), tape.flexible(y)) if axis is not None}
    if len(axes) > 1:
        raise UnsupportedOperator("its operands have channels along different axes")
    out = tape.fresh(shape)
    operands = [own.expand(shape).reshape(-1) for own in (x, y)]
    for tensor, row in zip((a, b), operands, strict=True):
        full = (1,) * (ndim - tensor.ndim) + tuple(tensor.shape)
        # An operand of size 1 along the channel axis is spread over the channels: it has no place among them.
        if not axes or full[min(axes)] > 1:
            tape.tie(out.view(-1), row)
    if len(varying(out)) > 1:
        tape.inherit(out, (x if len(varying(x)) >= len(varying(y)) else y).expand(shape))
    tape.zeros.append(Zero(zero, out.view(-1), torch.stack(operands)))
    return out


def _per_channel(tape: Tape, call: Call, constant: Tensor, shape: tuple[int, ...], atoms: Tensor) -> None:
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


def add(tape: Tape, call: Call) -> Tensor:
    """Tied; zero only where both operands are. The same for sub, maximum and minimum."""
    if any(isinstance(term, int | float) and term == 0 for term in call.args[:2]):
        return _binary(tape, call, "all", "carry")
    return _binary(tape, call, "all", "never")


def mul(tape: Tape, call: Call) -> Tensor:
    """Tied; zero where either operand is."""
    return _binary(tape, call, "any", "carry")


def div(tape: Tape, call: Call) -> Tensor:
    if call.atoms_of(call.args[1]) is not None:
        raise UnsupportedOperator("its divisor depends on the input")
    return mul(tape, call)


# --- over space -------------------------------------------------------------------------------------------------------


def pool(tape: Tape, call: Call) -> Any:
    """Pooling and resizing: channels along axis 1 (0 without a batch), mixed along the rest only."""
    call.only_first()
    if max(varying(call.x), default=0) > max(0, call.args[0].ndim - _SPATIAL.get(_name(call), 2) - 1):
        raise UnsupportedOperator("its channels lie along a spatial axis")
    return [call.x, call.x] if isinstance(call.out, tuple) else call.x


_SPATIAL = {f"{kind}{d}d": d for d in (1, 2, 3) for kind in ("max_pool", "avg_pool", "adaptive_avg_pool")}
_SPATIAL |= {f"adaptive_max_pool{d}d": d for d in (1, 2, 3)} | {f"max_pool{d}d_with_indices": d for d in (2, 3)}
_SPATIAL |= {"upsample_linear1d": 1, "upsample_nearest1d": 1, "upsample_trilinear3d": 3, "upsample_nearest3d": 3}


def reduce(tape: Tape, call: Call) -> Tensor:
    """Mean, sum or largest value over space or over branches; zero where all that meets in one place is."""
    x, axes = call.args[0], call.arg(1, "dim")
    axes = [axes] if isinstance(axes, int) else list(axes or range(x.ndim))
    axes = [axis % x.ndim for axis in axes]
    atoms, met = call.x, set(axes) & set(varying(call.x))
    if met and tape.flexible(atoms) in met:
        if _name(call) != "sum" or len(varying(atoms)) > 1:
            raise UnsupportedOperator("it runs over channels")
        tape.products.append(Product(atoms.reshape(-1), 0, sums=True))
        atoms = torch.full((1,) * x.ndim, FROZEN)
    elif met:
        parts = [atoms]
        for axis in met:
            parts = [piece for part in parts for piece in part.split(1, axis)]
        atoms = tape.derived("all", parts[0].shape, parts)
    if call.out.ndim == x.ndim:
        return atoms
    return atoms.view([size for axis, size in enumerate(atoms.shape) if axis not in axes])


def softmax(tape: Tape, call: Call) -> Tensor:
    if call.args[1] % call.args[0].ndim == tape.flexible(call.x):
        raise UnsupportedOperator("it runs over channels")
    return not_zero_preserving(tape, call)


def matmul(tape: Tape, call: Call) -> Tensor:
    """Products of activations as in attention: a sum over channels, or channels carried by the right factor.

    Rows (..., M, K) times columns (..., K, N). Summed over K, the channels of both factors are tied and needed unless one
    of them is zero. Channels along N are carried: their K summands are all zero together.
    """
    left, right = call.args[:2]
    a, b = (_atoms_or_frozen(call, t) for t in (left, right))
    if left.ndim < 3 or left.shape[:-2] != right.shape[:-2]:
        raise UnsupportedOperator("its factors are not batches of matrices")
    ndim, macs = left.ndim, call.out.numel() * left.shape[-1]
    axis_a, axis_b = _matrix_axis(tape, a), _matrix_axis(tape, b)
    if axis_a == ndim - 1 and axis_b == ndim - 2:
        turned = b.transpose(-1, -2)
        pairs = tape.derived("any", torch.broadcast_shapes(a.shape, turned.shape), [a, turned])
        tape.products.append(Product(pairs.reshape(-1), macs // pairs.numel(), sums=True))
        return torch.full((1,) * ndim, FROZEN)
    if axis_a is None and axis_b == ndim - 1:
        tape.products.append(Product(b.reshape(-1), macs // b.numel(), sums=False))
        return b
    if axis_b is None and axis_a == ndim - 2:
        tape.products.append(Product(a.reshape(-1), macs // a.numel(), sums=False))
        return a
    raise UnsupportedOperator("its channels are neither summed over by both factors nor carried by one")


def attention(tape: Tape, call: Call) -> Tensor:
    """scaled_dot_product_attention: queries and keys keep their channels unless the scale is given, since it counts them."""
    query, key, value = (_atoms_or_frozen(call, t) for t in call.args[:3])
    ndim = call.args[0].ndim
    if any(_matrix_axis(tape, t) not in (None, ndim - 1) for t in (query, key, value)):
        raise UnsupportedOperator("its channels lie along another axis than the last")
    macs = call.args[0].shape[-2] * call.args[1].shape[-2] * call.args[0][..., 0, 0].numel()
    if call.kwargs.get("scale") is None:
        for atoms in (query, key):
            tape.freeze(atoms, "scaled_dot_product_attention: its scale counts the channels of queries and keys")
        tape.other_macs += macs * call.args[0].shape[-1]
    else:
        pairs = tape.derived("any", torch.broadcast_shapes(query.shape, key.shape), [query, key])
        tape.products.append(Product(pairs.reshape(-1), macs * call.args[0].shape[-1] // pairs.numel(), sums=True))
    tape.products.append(Product(value.reshape(-1), macs * call.args[2].shape[-1] // value.numel(), sums=False))
    return value


def _matrix_axis(tape: Tape, atoms: Tensor) -> int | None:
    """Return the axis of a batch of matrices along which channels may go: one of the last two, and all of it, or none."""
    axes, flexible = varying(atoms), tape.flexible(atoms)
    last = {atoms.ndim - 1, atoms.ndim - 2}
    if 0 in axes or (flexible is not None and (flexible not in last or last & set(axes) != {flexible})):
        raise UnsupportedOperator("its channels do not lie along one side of its matrices")
    return flexible


def _atoms_or_frozen(call: Call, tensor: Tensor) -> Tensor:
    atoms = call.atoms_of(tensor)
    return torch.full((1,) * tensor.ndim, FROZEN) if atoms is None else atoms


def pad(tape: Tape, call: Call) -> Tensor:
    """Padding of space; the amounts of a padding of channels are written into forward."""
    amounts = call.args[1]
    axes = {call.args[0].ndim - 1 - i // 2 for i, amount in enumerate(amounts) if amount}
    if axes & set(varying(call.x)):
        raise UnsupportedOperator("it pads channels by amounts written into forward")
    if _name(call) == "pad":
        mode, value = call.arg(2, "mode", "constant"), call.arg(3, "value")
    else:
        mode, value = "constant", call.arg(2, "value", 0)
    return call.x if mode != "constant" or not value else tape.derived("never", call.x.shape, [call.x])


# --- data movement ----------------------------------------------------------------------------------------------------


def rearrange(tape: Tape, call: Call) -> Tensor:
    """Views and permutations: the same operator on the atoms, shaped like the activation."""
    call.only_first()
    full, name = call.x.expand(call.args[0].shape), _name(call)
    moved = full.reshape(call.out.shape) if name in _RESHAPES else call.func(full, *call.args[1:], **call.kwargs)
    atoms = compress(moved)
    axis = tape.flexible(atoms)
    sizes = _written_sizes(call, name)
    if len(sizes) == atoms.ndim:
        for i, (number, size) in enumerate(zip(sizes, match(sizes, call.sizes), strict=True)):
            if i == axis and number != -1:
                _follow(tape, size, rows_along(atoms, axis)[0], f"{name} to sizes {sizes}")
            elif i != axis and size is not None:
                _stays(tape, size, f"{name} to sizes {sizes}")
    return atoms


_RESHAPES = ("view", "reshape", "_unsafe_view")


def _written_sizes(call: Call, name: str) -> list[int]:
    """Return the sizes of all axes of the output as the operator was given them; -1 for what it works out."""
    if name in (*_RESHAPES, "expand"):
        return list(call.args[1] if isinstance(call.args[1], list | tuple) else call.args[1:])
    if name == "unflatten":
        axis, sizes = call.args[1] % call.args[0].ndim, list(call.args[2])
        return [-1] * axis + sizes + [-1] * (call.args[0].ndim - axis - 1)
    return []


def _follow(tape: Tape, size: Size | None, atoms: Tensor, what: str) -> None:
    """Let a size that counts these atoms follow them: an attribute is set anew, any other must come from a shape."""
    if _settable(size):
        tape.resize(size, atoms, f"{what}, from attributes")
        return
    others = [tape.axes[i] for i in axes_of(size)]
    for other in others:  # the size of another tensor's axis: both must stay equally long
        if len(other) == len(atoms) and not torch.equal(other.sort().values, atoms.sort().values):
            tape.tie(other, atoms)
    tape.doubt(torch.cat((atoms, *others)), f"{what} that may be written into forward")


def _stays(tape: Tape, size: Size, what: str) -> None:
    """Keep a size of an axis along which no channel goes: its attribute, and unless it fits, the axis it was read from."""
    if _settable(size):
        tape.resize(size, torch.full((int(size),), FROZEN), f"{what}, from attributes")
    for i in axes_of(size):
        if len(tape.axes[i]):
            tape.doubt(tape.axes[i], f"{what} along an axis that keeps its size")


def _settable(size: Size | None) -> bool:
    """Return whether a size is made of attributes alone."""
    return size is not None and not axes_of(size)


def view_as(tape: Tape, call: Call) -> Tensor:
    """A view to the shape of another tensor; channels of both must stay equally many."""
    other = call.atoms_of(call.args[1])
    if other is None:
        raise UnsupportedOperator("the size of a constant")
    atoms = compress(call.x.expand(call.args[0].shape).reshape(call.out.shape))
    if varying(atoms) != varying(other) or len(varying(atoms)) > 1:
        raise UnsupportedOperator("its channels lie along another axis than those of the tensor it is shaped like")
    tape.tie(atoms, other)
    return atoms


def expand_as(tape: Tape, call: Call) -> Tensor:
    """Spread over the space of another tensor; channels of both must stay equally many."""
    x, other = call.x, call.atoms_of(call.args[1])
    if other is None:
        raise UnsupportedOperator("the size of a constant")
    x = x.view((1,) * (call.out.ndim - x.ndim) + x.shape)
    if set(varying(other)) - set(varying(x)):
        raise UnsupportedOperator("it is spread over channels")
    tape.tie(x, other)
    return x


def type_as(tape: Tape, call: Call) -> Tensor:
    return call.x


def concatenate(tape: Tape, call: Call) -> Tensor:
    tensors, axis = call.args[0], call.arg(1, "dim", 0) % call.out.ndim
    tensors = [t for t in tensors if t.numel()]  # torch lets an empty one pass
    atoms = [call.atoms_of(t) for t in tensors]
    channels = any(a is not None and axis in varying(a) for a in atoms)
    if any(a is None for a in atoms):
        raise UnsupportedOperator("a constant is concatenated")
    if any(set(varying(a)) - {axis} for a in atoms) and channels:
        raise UnsupportedOperator("its operands have channels along different axes")
    if not channels and any(varying(a) for a in atoms):  # along space: the same place must go everywhere
        if all(torch.equal(a, atoms[0]) for a in atoms):
            return atoms[0]
        return tape.derived("all", torch.broadcast_shapes(*(a.shape for a in atoms)), atoms)
    parts = [
        a.expand([t.shape[axis] if i == axis else 1 for i in range(t.ndim)])
        for a, t in zip(atoms, tensors, strict=True)
    ]
    return compress(torch.cat(parts, axis))


def stack(tape: Tape, call: Call) -> Tensor:
    axis = call.arg(1, "dim", 0) % call.out.ndim
    atoms = [call.atoms_of(t) for t in call.args[0]]
    if any(a is None for a in atoms):
        raise UnsupportedOperator("a constant is stacked")
    shape = torch.broadcast_shapes(*(a.shape for a in atoms))
    stacked = compress(torch.stack([a.expand(shape) for a in atoms], axis))
    inner = [i for i in varying(stacked) if i != axis]
    tape.flexible(stacked, inner[-1] if inner else None)
    return stacked


def chunk(tape: Tape, call: Call) -> list[Tensor]:
    """Equal parts: the same positions of every part stay, so that they stay equal."""
    x, axis = call.args[0], call.arg(2, "dim", 0) % call.args[0].ndim
    if axis not in varying(call.x):
        return [call.x] * len(call.out)
    if x.shape[axis] % len(call.out) or tape.flexible(call.x) != axis:
        raise UnsupportedOperator("its parts are not equal")
    return _equal_parts(tape, call.x, len(call.out), axis)


def _equal_parts(tape: Tape, atoms: Tensor, count: int, axis: int) -> list[Tensor]:
    parts = list(atoms.chunk(count, axis))
    for part in parts[1:]:
        tape.tie(parts[0], part)
    return parts


def split(tape: Tape, call: Call) -> list[Tensor]:
    """Parts of sizes that follow their channels where they come from attributes; equal parts stay equal."""
    axis = call.arg(2, "dim", 0) % call.args[0].ndim
    if axis not in varying(call.x):
        return [call.x] * len(call.out)
    if _name(call) == "tensor_split" or tape.flexible(call.x) != axis:
        raise UnsupportedOperator("it splits channels at positions written into forward")
    lengths = [part.shape[axis] for part in call.out]
    equal = isinstance(call.args[1], int) and len(set(lengths)) == 1
    if equal:
        parts = _equal_parts(tape, call.x, len(lengths), axis)
        size = match(lengths[:1], call.sizes)[0]
        _follow(tape, size, rows_along(parts[0], axis)[0], f"a split into parts of {lengths[0]}")
        return parts
    sizes = match(lengths, call.sizes)
    if not all(map(_settable, sizes)):
        raise UnsupportedOperator("it splits channels at positions written into forward")
    parts = list(call.x.split(lengths, axis))
    for part, size in zip(parts, sizes, strict=True):
        _follow(tape, size, rows_along(part, axis)[0], f"a split into parts of {lengths}")
    return parts


def unbind(tape: Tape, call: Call) -> list[Tensor]:
    axis = call.arg(1, "dim", 0) % call.args[0].ndim
    if axis not in varying(call.x):
        return [call.x.squeeze(axis)] * len(call.out)
    if axis == tape.flexible(call.x):
        raise UnsupportedOperator("it takes channels apart")
    return [compress(part) for part in call.x.unbind(axis)]


def select(tape: Tape, call: Call) -> Tensor:
    """One position along space or along an axis that keeps all of its positions."""
    axis = call.arg(1, "dim", 0) % call.args[0].ndim
    if axis not in varying(call.x):
        return call.x.squeeze(axis)
    if axis == tape.flexible(call.x):
        raise UnsupportedOperator("it selects one channel")
    return compress(call.x.select(axis, call.arg(2, "index")))


def slice_channels(tape: Tape, call: Call) -> Tensor:
    """Along space, or of channels up to or from a position that comes from an attribute."""
    axis = call.arg(1, "dim", 0) % call.args[0].ndim
    start, end, step = call.arg(2, "start") or 0, call.arg(3, "end"), call.arg(4, "step", 1)
    n = call.args[0].shape[axis]
    bounds = [bound for bound in (start, n if end is None else end) if 0 != bound < n]
    if axis not in varying(call.x) or not (bounds or step != 1):
        return call.x
    sizes = match(bounds, call.sizes)
    if step != 1 or tape.flexible(call.x) != axis or not all(map(_settable, sizes)):
        raise UnsupportedOperator("it slices channels at positions written into forward")
    row = rows_along(call.x, axis)[0]
    for bound, size in zip(bounds, sizes, strict=True):
        _follow(tape, size, row[:bound], f"a slice at channel {bound}")
    return compress(call.func(call.x, axis, start, n if end is None else end))


def pixel_shuffle(tape: Tape, call: Call) -> Tensor:
    """C * r * r channels become C: the r * r that meet in one must go together."""
    atoms, r = _channels(call, call.args[0], -3), call.args[1]
    grid = atoms.view(-1, r * r)
    return _along(tape.derived("all", (len(grid),), list(grid.T)), -3, call.out.ndim)


def pixel_unshuffle(tape: Tape, call: Call) -> Tensor:
    atoms, r = _channels(call, call.args[0], -3), call.args[1]
    return _along(atoms.repeat_interleave(r * r), -3, call.out.ndim)


def channel_shuffle(tape: Tape, call: Call) -> Tensor:
    atoms, groups = _channels(call, call.args[0], 1), call.args[1]
    grid = atoms.view(groups, -1)
    tape.tie(grid[:1], grid[1:])
    return _along(grid.T.reshape(-1), 1, call.out.ndim)


def _name(call: Call) -> str:
    return call.func._schema.name.removeprefix("aten::").rstrip("_")


def _table(rules: dict[Callable, str]) -> dict[str, Callable]:
    return {name: rule for rule, names in rules.items() for name in names.split()}


RULES: dict[str, Callable[[Tape, Call], Any]] = _table(
    {
        convolution: "conv1d conv2d conv3d",
        transposed_convolution: "conv_transpose1d conv_transpose2d conv_transpose3d",
        linear: "linear",
        batch_norm: "batch_norm",
        index_select: "index_select",
        index_copy: "index_copy",
        zero_preserving: "relu relu6 leaky_relu silu hardswish gelu tanh elu selu celu mish softsign abs neg sqrt square "
        "sin erf hardshrink softshrink tanhshrink dropout feature_dropout alpha_dropout clone contiguous to _to_copy detach "
        "alias lift_fresh positive sign round floor nan_to_num",
        not_zero_preserving: "sigmoid hardsigmoid exp softplus log_sigmoid cos rsub logical_not",
        clamp: "clamp clamp_min clamp_max hardtanh",
        power: "pow",
        prelu: "prelu",
        add: "add sub subtract maximum minimum",
        mul: "mul multiply",
        div: "div divide true_divide",
        pool: " ".join(_SPATIAL) + " upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa",
        reduce: "mean sum amax amin",
        softmax: "softmax log_softmax _softmax",
        pad: "pad constant_pad_nd",
        rearrange: "view reshape _unsafe_view flatten unflatten permute transpose t unsqueeze squeeze expand movedim swapaxes "
        "flip",
        expand_as: "expand_as",
        view_as: "view_as reshape_as",
        matmul: "matmul bmm",
        attention: "scaled_dot_product_attention",
        type_as: "type_as",
        concatenate: "cat concat",
        stack: "stack",
        chunk: "chunk",
        split: "split split_with_sizes tensor_split",
        unbind: "unbind",
        slice_channels: "slice",
        select: "select",
        pixel_shuffle: "pixel_shuffle",
        pixel_unshuffle: "pixel_unshuffle",
        channel_shuffle: "channel_shuffle",
    }
)
