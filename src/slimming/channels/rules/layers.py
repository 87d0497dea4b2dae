"""Rules of layers with weights. A layer is recognised by the identity of its weight."""

import math

import torch
from torch import Tensor, nn

from slimming.channels.atoms import along
from slimming.channels.rules.call import Call
from slimming.channels.rules.written_sizes import is_settable
from slimming.channels.sizes import match
from slimming.channels.tape import Tape, UnsupportedOperator, Use, Zero


def convolution(tape: Tape, call: Call) -> Tensor:
    """Read the input's channels and write new ones; grouped convolutions also tie them."""
    use, module = _convolution(tape, call, "conv", call.out)
    if use.groups > 1:
        if not isinstance(module, nn.modules.conv._ConvNd):
            size = match([use.groups], call.sizes)[0]
            if use.groups != len(use.read) or not is_settable(size):
                raise UnsupportedOperator(
                    "a grouped convolution outside torch.nn: its number of groups is written into forward"
                )
            tape.resize(size, use.read, f"a depthwise convolution of {use.groups} groups, from attributes")
        if use.groups == len(use.read):
            _depthwise(tape, use)
        else:
            _grouped(tape, use)
    tape.use(use)
    return along(use.write, 1, call.out.ndim)


def transposed_convolution(tape: Tape, call: Call) -> Tensor:
    use, _ = _convolution(tape, call, "transposed", call.args[0])
    if use.groups > 1:
        raise UnsupportedOperator("a grouped transposed convolution")
    tape.use(use)
    return along(use.write, 1, call.out.ndim)


def _convolution(tape: Tape, call: Call, kind: str, applied: Tensor) -> tuple[Use, nn.Module]:
    """Return the use of a convolution; its kernel is applied once per position of `applied`."""
    x, weight, bias = call.args[0], call.args[1], call.arg(2, "bias")
    name, module = _layer(call, weight, bias)
    if x.ndim != weight.ndim:
        raise UnsupportedOperator("its input has no batch axis")
    positions = applied.shape[0] * math.prod(applied.shape[2:])
    return Use(
        kind,
        name,
        read=call.channels(x, 1),
        write=tape.fresh((call.out.shape[1],)),
        groups=call.arg(6, "groups", 1),
        positions=positions,
        kernel=math.prod(weight.shape[2:]),
        bias=bias is not None,
    ), module


def _depthwise(tape: Tape, use: Use) -> None:
    """Output j belongs to input j // m and is zero where it is, unless a bias is added."""
    use.kind = "depthwise"
    source = use.read.repeat_interleave(len(use.write) // use.groups)
    tape.tie(use.write, source)
    if not use.bias:
        tape.zeros.append(Zero("all", use.write, source[None]))


def _grouped(tape: Tape, use: Use) -> None:
    """The same positions of every group stay, so that the groups stay equal."""
    use.kind = "grouped"
    for side in (use.read, use.write):
        grid = side.view(use.groups, -1)
        tape.tie(grid[:1], grid[1:])


def linear(tape: Tape, call: Call) -> Tensor:
    x, weight, bias = call.args[0], call.args[1], call.arg(2, "bias")
    name, _ = _layer(call, weight, bias)
    positions, write = math.prod(x.shape[:-1]), tape.fresh((weight.shape[0],))
    use = Use("linear", name, call.channels(x, -1), write, positions=positions, bias=bias is not None)
    tape.use(use)
    return along(use.write, -1, call.out.ndim)


def batch_norm(tape: Tape, call: Call) -> Tensor:
    """Read the input's channels and write slots, which are zero where gamma is pruned."""
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
    read = call.channels(x, 1)
    slots = tape.fresh((len(read),))
    source = tape.sources.pop(name, read)
    if weight is not None and bias is not None:
        tape.zeros.append(Zero("gamma", slots, layer=name))
    tape.use(Use("norm", name, read, slots, source=source, target=slots, bias=bias is not None))
    return along(slots, 1, x.ndim)


def index_select(tape: Tape, call: Call) -> Tensor:
    """Support the selection of a SelectBatchNorm alone; surgery renews its indices."""
    owner = call.owner_of(call.args[2])
    if owner is None or call.args[1] != 1:
        raise UnsupportedOperator("indices that are written into forward")
    source = call.channels(call.args[0], 1)
    tape.sources[owner[0].removesuffix(".select")] = source
    return along(source[call.args[2].cpu()], 1, call.out.ndim)


def index_copy(tape: Tape, call: Call) -> Tensor:
    """Support the scatter of a SelectBatchNorm alone: it leaves zeros wherever it writes nothing."""
    out, axis, index, source = call.args
    owner = call.owner_of(index)
    if owner is None or axis != 1 or call.atoms_of(out) is not None:
        raise UnsupportedOperator("indices that are written into forward")
    target, index = tape.fresh((out.shape[1],)), index.cpu()
    empty = torch.ones(len(target), dtype=torch.bool)
    empty[index] = False
    tape.zeros.append(Zero("always", target[empty]))
    target[index] = call.channels(source, 1)
    uses = [use for use in tape.uses if use.name == owner[0].removesuffix(".scatter")]
    uses[-1].target = target
    if uses[0].target is not None:
        tape.tie(uses[0].target, target)
    return along(target, 1, call.out.ndim)


def _layer(call: Call, weight: Tensor, bias: Tensor | None) -> tuple[str, nn.Module]:
    owner = call.owner_of(weight)
    if owner is None or (bias is not None and (call.owner_of(bias) or ("", None))[1] is not owner[1]):
        raise UnsupportedOperator("its weight is computed or shared between modules, not owned by one")
    return owner
