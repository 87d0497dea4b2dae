"""One short rule per operator: how channels pass through it. The only place that knows operators.

A rule gets the Tape and the Call and returns the compact atoms of its output (a list for several outputs). It raises Unknown
where it cannot prove anything; the watcher then freezes what the operator read. To add an operator, write a rule and list
it under its ATen name (without the underscore of the in-place form).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimming.channels.tape import Tape, Unknown, Use, Zero, compress, varying


@dataclass
class Call:
    """One operator call: its arguments, its result, and the atoms and layers behind tensors."""

    func: Any
    args: tuple
    kwargs: dict
    out: Any
    atoms_of: Callable[[Any], Tensor | None]  # None for what does not depend on the input
    owner_of: Callable[[Tensor | None], tuple[str, nn.Module] | None]  # layer of a parameter or buffer

    @property
    def x(self) -> Tensor:
        """Atoms of the first argument."""
        atoms = self.atoms_of(self.args[0])
        if atoms is None:
            raise Unknown("its first argument is a constant")
        return atoms

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        return self.args[index] if len(self.args) > index else self.kwargs.get(name, default)

    def only_first(self) -> None:
        """Raise Unknown where another argument depends on the input, too."""
        rest = [*self.args[1:], *self.kwargs.values()]
        if any(self.atoms_of(a) is not None for a in rest if isinstance(a, Tensor)):
            raise Unknown("a second argument depends on the input")


# --- layers -----------------------------------------------------------------------------------------------------------


def _channels(call: Call, tensor: Tensor, axis: int) -> Tensor:
    """Return the atoms (C,) along `axis`; they must not change along any other."""
    atoms = call.atoms_of(tensor)
    if atoms is None:
        raise Unknown("its input is a constant")
    axis %= tensor.ndim
    if set(varying(atoms)) - {axis}:
        raise Unknown("its channels do not lie along one axis")
    return atoms.reshape(-1).expand(tensor.shape[axis])


def _along(atoms: Tensor, axis: int, ndim: int) -> Tensor:
    return atoms.view([-1 if i == axis % ndim else 1 for i in range(ndim)])


def _layer(call: Call, weight: Tensor, bias: Tensor | None) -> tuple[str, nn.Module]:
    owner = call.owner_of(weight)
    if owner is None or (bias is not None and (call.owner_of(bias) or ("", None))[1] is not owner[1]):
        raise Unknown("its weight is computed or shared between modules, not owned by one")
    return owner


def convolution(tape: Tape, call: Call, transposed: bool = False) -> Tensor:
    x, weight, bias = call.args[0], call.args[1], call.arg(2, "bias")
    groups = call.arg(7 if transposed else 6, "groups", 1)
    if transposed:
        groups = call.arg(6, "groups", 1)
    name, module = _layer(call, weight, bias)
    if x.ndim != weight.ndim:
        raise Unknown("its input has no batch axis")
    read, c_out = _channels(call, x, 1), call.out.shape[1]
    kernel = math.prod(weight.shape[2:])
    positions = math.prod((x if transposed else call.out).shape[2:])
    use = Use("transposed" if transposed else "conv", name, read, tape.fresh((c_out,)), groups, positions, kernel)
    use.bias = bias is not None
    if groups > 1:
        if not isinstance(module, nn.modules.conv._ConvNd):
            raise Unknown("a grouped convolution outside torch.nn: its number of groups is written into forward")
        if groups == len(read) and not transposed:
            use.kind = "depthwise"  # output j belongs to input j // m
            tape.tie(use.write, read.repeat_interleave(c_out // groups))
            if bias is None:
                source = read.repeat_interleave(c_out // groups)
                tape.zeros.append(Zero("all", use.write, source[None]))
        elif transposed:
            raise Unknown("a grouped transposed convolution")
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
    positions = math.prod(x.shape[1:-1])
    use = Use("linear", name, _channels(call, x, -1), tape.fresh((weight.shape[0],)), positions=positions)
    use.bias = bias is not None
    tape.use(use)
    return _along(use.write, -1, call.out.ndim)


def batch_norm(tape: Tape, call: Call) -> Tensor:
    x, weight, bias, mean = call.args[:4]
    owner = call.owner_of(weight if weight is not None else mean)
    if owner is None or not isinstance(owner[1], nn.modules.batchnorm._BatchNorm):
        raise Unknown("a batch norm without a BatchNorm module")
    name, _ = owner
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
        raise Unknown("indices that are written into forward")
    source = _channels(call, call.args[0], 1)
    tape.sources[owner[0].removesuffix(".select")] = source
    return _along(source[call.args[2].cpu()], 1, call.out.ndim)


def index_copy(tape: Tape, call: Call) -> Tensor:
    """Only the placement of our SelectBatchNorm: zeros wherever it places nothing."""
    out, axis, index, source = call.args
    owner = call.owner_of(index)
    if owner is None or axis != 1 or call.atoms_of(out) is not None:
        raise Unknown("indices that are written into forward")
    target, index = tape.fresh((out.shape[1],)), index.cpu()
    empty = torch.ones(len(target), dtype=torch.bool)
    empty[index] = False
    tape.zeros.append(Zero("always", target[empty]))
    target[index] = _channels(call, source, 1)
    uses = [use for use in tape.uses if use.name == owner[0].removesuffix(".place")]
    uses[-1].target = target
    tape.tie(uses[0].target, target)
    return _along(target, 1, call.out.ndim)


# --- element by element -----------------------------------------------------------------------------------------------


def carry(tape: Tape, call: Call) -> Tensor:
    """f(0) = 0, element by element."""
    call.only_first()
    return call.x


def tied(tape: Tape, call: Call) -> Tensor:
    """f(0) != 0, element by element: the same size, but a zero is no longer zero."""
    call.only_first()
    return tape.derived("never", call.x.shape, [call.x])


def clamp(tape: Tape, call: Call) -> Tensor:
    low, high = call.arg(1, "min"), call.arg(2, "max")
    if call.func._schema.name.startswith("aten::hardtanh"):
        low, high = call.arg(1, "min_val", -1), call.arg(2, "max_val", 1)
    if any(isinstance(bound, Tensor) for bound in (low, high)):
        raise Unknown("bounds that are tensors")
    keeps_zero = (low is None or low <= 0) and (high is None or high >= 0)
    return carry(tape, call) if keeps_zero else tied(tape, call)


def power(tape: Tape, call: Call) -> Tensor:
    exponent = call.args[1]
    if isinstance(exponent, Tensor) or isinstance(call.args[0], int | float):
        raise Unknown("a power of tensors")
    return carry(tape, call) if exponent > 0 else tied(tape, call)


def prelu(tape: Tape, call: Call) -> Tensor:
    if call.args[1].numel() > 1:
        raise Unknown("one slope per channel")
    return carry(tape, call)


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
                raise Unknown("a constant of fixed size meets its channels")
        return known if with_constant == "carry" else tape.derived("never", known.shape, [known])
    x, y = (t.view((1,) * (ndim - t.ndim) + t.shape) for t in atoms)
    if x.shape == y.shape and torch.equal(x, y):
        return x
    shape = torch.broadcast_shapes(x.shape, y.shape)
    if len(varying(x)) > 1 or len(varying(y)) > 1 or sum(size > 1 for size in shape) > 1:
        raise Unknown("its operands have channels along different axes")
    # An operand of size 1 along the channel axis is spread over the channels: it has no place among them.
    axis = next((i for i, size in enumerate(shape) if size > 1), None)
    rows = []
    for tensor, own in ((a, x), (b, y)):
        full = (1,) * (ndim - tensor.ndim) + tuple(tensor.shape)
        if axis is not None and full[axis] == 1:
            rows.append((own, False))
        else:
            rows.append((own, True))
    out = tape.fresh(shape)
    operands = [row.expand(shape).reshape(-1) for row, _ in rows]
    for row, has_place in zip(operands, rows, strict=True):
        if has_place[1]:
            tape.tie(out.view(-1), row)
    tape.zeros.append(Zero(zero, out.view(-1), torch.stack(operands)))
    return out


def add(tape: Tape, call: Call) -> Tensor:
    """Tied; zero only where both operands are. The same for sub, maximum and minimum."""
    return _binary(tape, call, "all", "never")


def mul(tape: Tape, call: Call) -> Tensor:
    """Tied; zero where either operand is."""
    return _binary(tape, call, "any", "carry")


def div(tape: Tape, call: Call) -> Tensor:
    if call.atoms_of(call.args[1]) is not None:
        raise Unknown("its divisor depends on the input")
    return mul(tape, call)


# --- over space -------------------------------------------------------------------------------------------------------


def pool(tape: Tape, call: Call) -> Any:
    """Pooling and resizing: channels along axis 1 (0 without a batch), mixed along the rest only."""
    call.only_first()
    if max(varying(call.x), default=0) > max(0, call.args[0].ndim - _SPATIAL.get(_name(call), 2) - 1):
        raise Unknown("its channels lie along a spatial axis")
    return [call.x, call.x] if isinstance(call.out, tuple) else call.x


_SPATIAL = {f"{kind}{d}d": d for d in (1, 2, 3) for kind in ("max_pool", "avg_pool", "adaptive_avg_pool")}
_SPATIAL |= {f"adaptive_max_pool{d}d": d for d in (1, 2, 3)} | {f"max_pool{d}d_with_indices": d for d in (2, 3)}
_SPATIAL |= {"upsample_linear1d": 1, "upsample_nearest1d": 1, "upsample_trilinear3d": 3, "upsample_nearest3d": 3}


def reduce(tape: Tape, call: Call) -> Tensor:
    """Mean or sum over axes along which the atoms do not change."""
    x, axes = call.args[0], call.arg(1, "dim")
    axes = [axes] if isinstance(axes, int) else list(axes or range(x.ndim))
    axes = [axis % x.ndim for axis in axes]
    if set(axes) & set(varying(call.x)):
        raise Unknown("it sums over channels")
    if call.out.ndim == x.ndim:
        return call.x
    return call.x.view([size for axis, size in enumerate(call.x.shape) if axis not in axes])


def softmax(tape: Tape, call: Call) -> Tensor:
    if call.args[1] % call.args[0].ndim in varying(call.x):
        raise Unknown("it runs over channels")
    return tied(tape, call)


def pad(tape: Tape, call: Call) -> Tensor:
    """Padding of space; the amounts of a padding of channels are written into forward."""
    amounts = call.args[1]
    axes = {call.args[0].ndim - 1 - i // 2 for i, amount in enumerate(amounts) if amount}
    if axes & set(varying(call.x)):
        raise Unknown("it pads channels by amounts written into forward")
    if _name(call) == "pad":
        mode, value = call.arg(2, "mode", "constant"), call.arg(3, "value")
    else:
        mode, value = "constant", call.arg(2, "value", 0)
    return call.x if mode != "constant" or not value else tape.derived("never", call.x.shape, [call.x])


# --- data movement ----------------------------------------------------------------------------------------------------


def move(tape: Tape, call: Call) -> Tensor:
    """Views and permutations: the same operator on the atoms, shaped like the activation."""
    call.only_first()
    x = call.args[0]
    full = call.x.expand(x.shape)
    name = _name(call)
    if name in ("view", "reshape", "_unsafe_view", "view_as"):
        moved = full.reshape(call.out.shape)
    else:
        moved = call.func(full, *call.args[1:], **call.kwargs)
    atoms = _rectangular(tape, compress(moved))
    if name in ("view", "reshape", "_unsafe_view"):
        sizes = call.args[1] if isinstance(call.args[1], list | tuple) else call.args[1:]
        if any(sizes[axis] != -1 for axis in varying(atoms) if axis < len(sizes)):
            tape.doubtful.append((atoms.reshape(-1), f"{name} to sizes {list(sizes)} that may be written into forward"))
    return atoms


def expand_as(tape: Tape, call: Call) -> Tensor:
    """Spread over the space of another tensor; channels of both must stay equally many."""
    x, other = call.x, call.atoms_of(call.args[1])
    if other is None:
        raise Unknown("the size of a constant")
    x = x.view((1,) * (call.out.ndim - x.ndim) + x.shape)
    if set(varying(other)) - set(varying(x)):
        raise Unknown("it is spread over channels")
    tape.tie(x, other)
    return x


def type_as(tape: Tape, call: Call) -> Tensor:
    return call.x


def _rectangular(tape: Tape, atoms: Tensor) -> Tensor:
    """Tie atoms that change along several axes so that whole rows go: all but the last such axis keep their size."""
    axes = varying(atoms)
    if len(axes) > 1:
        grid = atoms.movedim(axes[-1], -1).reshape(-1, atoms.shape[axes[-1]])
        tape.tie(grid[:1], grid[1:])
    return atoms


def concatenate(tape: Tape, call: Call) -> Tensor:
    tensors, axis = call.args[0], call.arg(1, "dim", 0) % call.out.ndim
    tensors = [t for t in tensors if t.numel()]  # torch lets an empty one pass
    atoms = [call.atoms_of(t) for t in tensors]
    channels = any(a is not None and axis in varying(a) for a in atoms)
    if any(a is None for a in atoms):
        raise Unknown("a constant is concatenated")
    if any(set(varying(a)) - {axis} for a in atoms) and channels:
        raise Unknown("its operands have channels along different axes")
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
        raise Unknown("a constant is stacked")
    shape = torch.broadcast_shapes(*(a.shape for a in atoms))
    return _rectangular(tape, compress(torch.stack([a.expand(shape) for a in atoms], axis)))


def chunk(tape: Tape, call: Call) -> list[Tensor]:
    """Equal parts: the same positions of every part stay, so that they stay equal."""
    x, axis = call.args[0], call.arg(2, "dim", 0) % call.args[0].ndim
    if axis not in varying(call.x):
        return [call.x] * len(call.out)
    if x.shape[axis] % len(call.out) or len(varying(call.x)) > 1:
        raise Unknown("its parts are not equal")
    parts = list(call.x.chunk(len(call.out), axis))
    for part in parts[1:]:
        tape.tie(parts[0], part)
    return parts


def split(tape: Tape, call: Call) -> list[Tensor]:
    if call.arg(2, "dim", 0) % call.args[0].ndim in varying(call.x):
        raise Unknown("it splits channels at positions written into forward")
    return [call.x] * len(call.out)


def unbind(tape: Tape, call: Call) -> list[Tensor]:
    axis = call.arg(1, "dim", 0) % call.args[0].ndim
    if axis in varying(call.x):
        raise Unknown("it takes channels apart")
    return [call.x.squeeze(axis)] * len(call.out)


def cut(tape: Tape, call: Call) -> Tensor:
    """slice and select: along space, or all of the channels."""
    axis = call.arg(1, "dim", 0) % call.args[0].ndim
    if _name(call) == "select":
        if axis in varying(call.x):
            raise Unknown("it selects one channel")
        return call.x.squeeze(axis)
    if axis in varying(call.x):
        start, end, step = call.arg(2, "start"), call.arg(3, "end"), call.arg(4, "step", 1)
        if start or step != 1 or (end is not None and end < 2**62):
            raise Unknown("it slices channels at positions written into forward")
    return call.x


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
        carry: "relu relu6 leaky_relu silu hardswish gelu tanh elu selu celu mish softsign abs neg sqrt square sin erf "
        "hardshrink softshrink tanhshrink dropout feature_dropout alpha_dropout clone contiguous to _to_copy detach alias "
        "lift_fresh positive sign round floor nan_to_num",
        tied: "sigmoid hardsigmoid exp softplus log_sigmoid cos rsub logical_not",
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
        move: "view reshape _unsafe_view flatten unflatten permute transpose t unsqueeze squeeze expand movedim swapaxes "
        "flip",
        expand_as: "expand_as",
        type_as: "type_as",
        concatenate: "cat concat",
        stack: "stack",
        chunk: "chunk",
        split: "split split_with_sizes tensor_split",
        unbind: "unbind",
        cut: "slice select",
        pixel_shuffle: "pixel_shuffle",
        pixel_unshuffle: "pixel_unshuffle",
        channel_shuffle: "channel_shuffle",
    }
)
