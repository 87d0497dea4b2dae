"""From a network and an example input to its channel graph: watching, and the rehearsal of sizes that are in doubt."""

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimming.channels import watch as watching
from slimming.channels.copying import shallow_copy
from slimming.channels.criteria import GlobalRatio
from slimming.channels.explain import kind_of
from slimming.channels.graph import ChannelGraph
from slimming.channels.plan import input_spec
from slimming.channels.sizes import mark_sizes
from slimming.channels.surgery import prove, prune
from slimming.channels.tape import Tape
from slimming.errors import GraphError


def trace(model: nn.Module, example: Any, *, train_input: Any = None, strict: bool = False) -> ChannelGraph:
    """Watch the model run on an example input, in eval and in train mode; the model is not changed.

    Args:
        model: any network that runs.
        example: a tensor, a tuple of arguments or a dict of keyword arguments, on the model's device; batch size 1 works.
        train_input: another input for train mode, for networks that want targets there.
        strict: raise instead of freezing what is not understood.

    Raises:
        GraphError: the model fails on the example, lies on another device, or (strict) holds an operator without a rule.
    """
    watching.check_device(model, example)
    tape, reason = Tape(), ""
    _check_initialised(model)
    copied = shallow_copy(model)
    mark_sizes(copied)
    try:
        evaluation = watching.watch(tape, copied.eval(), example)
    except Exception as error:
        raise GraphError(f"the network fails on the example input: {type(error).__name__}: {error}") from error
    evaluated, mark = (len(tape.uses), len(tape.products)), tape.mark()
    watching.set_training(copied, norms=False)  # a BatchNorm in train mode refuses a batch of one
    if train_input is not None or not watching.does_the_same(evaluation, copied, example):
        reason = _watch_training(tape, copied, example if train_input is None else train_input)
    if reason:
        tape.rewind(mark)
    tape.other_macs = mark[1]  # costs are those of eval mode
    graph = ChannelGraph(model, tape, evaluated, input_spec(example), reason)
    if tape.doubtful or tape.resizes:
        graph = _settle_doubts(graph)
    if strict and (graph.unknown or reason):
        what = graph.unknown[0] if graph.unknown else f"train mode fails ({reason}): give train_input"
        raise GraphError(f"strict: not everything is understood: {what}")
    return graph


def _watch_training(tape: Tape, copied: nn.Module, example: Any) -> str:
    """Watch a copy in train mode; return why it fails, if it does."""
    if any(isinstance(m, _BatchNorm) and m.training for m in copied.modules()):
        example = watching.repeat(example)
    try:
        watching.watch(tape, copied, example)
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


def _settle_doubts(graph: ChannelGraph) -> ChannelGraph:
    """Rehearse: prune half of everything at random. Sizes with which that fails are frozen, the others may follow.

    If all together fail, one kind after the other is tried.
    """
    tape = graph.tape
    doubts = [(atoms, reason) for atoms, reason in tape.doubtful]
    doubts += [(resize.atoms, resize.reason) for resize in tape.resizes]
    if _rehearse(graph):
        return graph
    good: list[str] = []
    sure = len(tape.frozen)

    def freeze_all_but(kinds: list[str]) -> ChannelGraph:
        tape.frozen[sure:] = [(atoms, reason) for atoms, reason in doubts if kind_of(reason) not in kinds]
        return graph.anew()

    for kind in dict.fromkeys(kind_of(reason) for _, reason in doubts):
        if _rehearse(freeze_all_but([*good, kind])):
            good.append(kind)
    return freeze_all_but(good)


def _rehearse(graph: ChannelGraph) -> bool:
    """Return whether half of all gammas can go at random, decided either way, and the proof holds."""
    for ties in ("apart", "together"):
        try:
            plan = graph.plan(GlobalRatio(0.5), ties=ties, score="random")
            prove(graph.model, prune(graph.model, plan, verify=False), plan, draws=1)
        except GraphError:  # nothing to prune: no doubt to settle
            continue
        except Exception:
            return False
    return True
