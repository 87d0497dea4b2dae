"""From a network and an example input to its channel graph."""

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimming.channels.copying import shallow_copy
from slimming.channels.graph import ChannelGraph, Recording
from slimming.channels.inputs import check_device, input_spec, repeat
from slimming.channels.modes import set_training
from slimming.channels.rehearsal import settle_doubts
from slimming.channels.replay import does_the_same
from slimming.channels.sizes import mark_sizes
from slimming.channels.tape import Tape
from slimming.channels.watch import watch
from slimming.errors import GraphError


def trace(model: nn.Module, example: Any, *, train_input: Any = None, strict: bool = False) -> ChannelGraph:
    """Watch the model run on an example input, in eval and in train mode; the model is not changed.

    Args:
        model: any network that runs.
        example: a tensor, a tuple of arguments or a dict of keyword arguments, on the model's device; batch size 1 works.
        train_input: another input for train mode, for networks that want targets there.
        strict: raise where something is not understood, instead of freezing it.

    Raises:
        GraphError: the model fails on the example, lies on another device, or (strict) holds an operator without a rule.
    """
    check_device(model, example)
    _check_initialised(model)
    graph = settle_doubts(ChannelGraph(model, _record(model, example, train_input)))
    reason = graph.train_reason
    if strict and (graph.unknown or reason):
        what = graph.unknown[0] if graph.unknown else f"train mode fails ({reason}): give train_input"
        raise GraphError(f"strict: not everything is understood: {what}")
    return graph


def _record(model: nn.Module, example: Any, train_input: Any) -> Recording:
    """Run a copy of the model in both modes; if train mode fails, only eval mode is on the tape."""
    tape, reason = Tape(), ""
    copied = shallow_copy(model)
    mark_sizes(copied)
    try:
        evaluation = watch(tape, copied.eval(), example)
    except Exception as error:
        raise GraphError(f"the network fails on the example input: {type(error).__name__}: {error}") from error
    evaluated, mark, macs = (len(tape.uses), len(tape.products)), tape.mark(), tape.other_macs
    set_training(copied, norms=False)  # a BatchNorm in train mode refuses a batch of one
    if train_input is not None or not does_the_same(evaluation, copied, example):
        reason = _watch_training(tape, copied, example if train_input is None else train_input)
    if reason:
        tape.rewind(mark)
    tape.other_macs = macs  # costs are those of eval mode
    return Recording(tape, evaluated, input_spec(example), reason)


def _watch_training(tape: Tape, copied: nn.Module, example: Any) -> str:
    """Watch a copy in train mode; return why it fails, if it does."""
    if any(isinstance(m, _BatchNorm) and m.training for m in copied.modules()):
        example = repeat(example)
    try:
        watch(tape, copied, example)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _check_initialised(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if any(nn.parameter.is_lazy(t) for t in (*module._parameters.values(), *module._buffers.values())):
            raise GraphError(
                f"{name or 'the network'} ({type(module).__name__}) has no sizes yet: run the network once on an example input "
                "before it is traced"
            )
