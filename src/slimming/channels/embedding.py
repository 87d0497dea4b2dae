"""A thin network inside a wider one that computes the same: its layers get zero channels beside their own.

Engines compute in blocks of channels, and a selection costs them that layout. So a few zero channels more are often faster, and
so is a SelectBatchNorm that reads the whole tensor, with gamma = beta = 0 where it selected nothing.
"""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimming.channels.copying import copy_model
from slimming.channels.graph import ChannelGraph
from slimming.channels.graph.structure import Step
from slimming.channels.inputs import call_model, draw_input, map_floats, tensors_in
from slimming.channels.layers import SelectBatchNorm
from slimming.channels.plan import LayerPlan
from slimming.channels.proof import DRAWS, TOLERANCE, relative_difference
from slimming.channels.sizes import new_values, write_attribute
from slimming.channels.surgery import axes_of, fit_attributes, tensors_of
from slimming.channels.widening import Widening, widen
from slimming.errors import PlanError

CLONE = -1  # in indices: a channel of zeros


def embed(graph: ChannelGraph, block: int = 1, full: Iterable[str] = ()) -> nn.Module:
    """Return a copy of a traced network, in eval mode, with zero channels more, that computes the same.

    Args:
        graph: of the network.
        block: widths that convolutions read and write become multiples of it, except those of inputs and outputs.
        full: names of SelectBatchNorms that shall read and write whole tensors; one that cannot stays as it is.

    Raises:
        PlanError: the two differ in float64, which is a bug worth reporting; or the widths cannot be made to match.
    """
    widening, done = widen(graph, block, full)
    layers = {name: _layer(widening, step, name in done) for name, step in graph.layers.items()}
    wide = _resized(graph, layers)
    _set_sizes(wide, widening)
    _prove(graph, wide, layers)
    return wide


def selecting(model: nn.Module) -> list[str]:
    """Return the names of the BatchNorms that select or scatter."""
    return [name for name, module in model.named_modules() if isinstance(module, SelectBatchNorm)]


# --- indices ------------------------------------------------------------------------------------------------------------


def _layer(widening: Widening, step: Step, full: bool) -> LayerPlan:
    """Return which old channel stands at every position of a layer; CLONE where none does."""
    use = step.use
    if use.kind == "norm":
        return _norm(widening, use.name, full)
    reads, writes = step.reads, step.writes
    size = (len(reads), len(writes))
    if use.kind == "grouped":
        reads = reads.view(use.groups, -1)[0]
        size = (len(reads), size[1])
    return LayerPlan(use.kind, widening.entries(reads).tolist(), widening.entries(writes).tolist(), size)


def _norm(widening: Widening, name: str, full: bool) -> LayerPlan:
    sides = widening.norms[name]
    source, target = widening.entries(sides.source), widening.entries(sides.target)
    count = len(sides.select)
    if full or not isinstance(widening.graph.modules[name], SelectBatchNorm):
        own = torch.full_like(source, CLONE)
        own[_positions(source, sides.select)] = torch.arange(count)
        return LayerPlan("norm", own.tolist(), own.tolist(), (count, count))
    return _indexed(sides.select, sides.scatter, source, target)


def _indexed(select: Tensor, scatter: Tensor, source: Tensor, target: Tensor) -> LayerPlan:
    """Return the channels of a BatchNorm that goes on selecting or scattering."""
    count, reads, writes = len(select), _positions(source, select), _positions(target, scatter)
    own = torch.arange(count)
    spare = torch.ones(len(target), dtype=torch.bool)
    spare[writes] = False
    if len(target) == count + int((target == CLONE).count_nonzero()):  # no scatter so far: none is needed
        own = torch.full_like(target, CLONE)
        own[writes] = torch.arange(count)
        reads, writes = torch.where(own == CLONE, reads[-1], reads[own]), torch.arange(len(target))
    elif len(source) > count and len(select) == len(source[source != CLONE]):  # no selection so far
        extra = (source == CLONE).nonzero().flatten()
        if len(extra) <= int(spare.count_nonzero()):  # zeros may be written wherever nothing is
            own = torch.full_like(source, CLONE)
            own[reads] = torch.arange(count)
            places = torch.empty_like(source)
            places[reads], places[extra] = writes, spare.nonzero().flatten()[: len(extra)]
            reads, writes = torch.arange(len(source)), places
    kept, size = own.tolist(), max(len(own), len(target))
    return LayerPlan(
        "norm", kept, kept, (size, size), _index(reads, len(source)), _index(writes, len(target)), len(target)
    )


def _index(positions: Tensor, size: int) -> list[int] | None:
    found: list[int] = positions.tolist()
    return None if _is_all(positions, size) else found


def _positions(entries: Tensor, old: Tensor) -> Tensor:
    """Return where the channels of old positions stand now."""
    new = torch.empty(int(entries.max()) + 1, dtype=torch.long)
    new[entries[entries >= 0]] = (entries >= 0).nonzero().flatten()
    return new[old]


def _is_all(index: Tensor, size: int) -> bool:
    return torch.equal(index, torch.arange(size))


# --- surgery ------------------------------------------------------------------------------------------------------------


def _resized(graph: ChannelGraph, layers: dict[str, LayerPlan]) -> nn.Module:
    replaced: dict[int, Tensor] = {}
    for name, layer in layers.items():
        for attribute, old in tensors_of(graph.model, graph.modules, name):
            fill = 1 if attribute == "running_var" else 0
            new = old.detach()
            for axis, entries in axes_of(layer, old):
                new = _spread(new, axis, entries, fill)
            new = new.clone() if new.data_ptr() == old.data_ptr() else new
            replaced[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    wide = copy_model(graph.model, replaced).eval()
    for name, layer in layers.items():
        fit_attributes(wide, name, layer)
    return wide


def _spread(tensor: Tensor, axis: int, entries: list[int], fill: float) -> Tensor:
    """Put the slices of an axis where `entries` says, and `fill` in between."""
    index = torch.tensor(entries, device=tensor.device)
    if _is_all(index.cpu(), tensor.shape[axis]):
        return tensor
    spread = tensor.index_select(axis, index.clamp(min=0))
    return spread.index_fill_(axis, (index == CLONE).nonzero().flatten(), fill)


def _set_sizes(wide: nn.Module, widening: Widening) -> None:
    """Set the sizes that modules keep in attributes."""
    graph = widening.graph
    counts = [(r.size, len(widening.entries(graph.component[r.atoms]))) for r in graph.tape.resizes]
    try:
        for attribute, value in new_values(counts, graph.model).items():
            write_attribute(wide, attribute, value)
    except ValueError as error:
        raise PlanError(f"sizes kept in attributes cannot follow: {error}") from error


# --- proof --------------------------------------------------------------------------------------------------------------


def _prove(graph: ChannelGraph, wide: nn.Module, layers: dict[str, LayerPlan]) -> None:
    """Raise PlanError unless both agree in float64 on seeded inputs; on later ones all betas are raised: see proof.prove."""
    device = next(p.device for p in graph.model.parameters())
    pair = [copy_model(m).double().eval() for m in (graph.model, wide)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for number, (scale, lift) in enumerate(DRAWS):
            drawn = draw_input(graph.spec, generator, device, torch.float64)
            example = map_floats(functools.partial(torch.mul, other=scale), drawn)
            if lift:
                _lift(pair[0], pair[1], layers, lift)
            outputs = [[t for t in tensors_in(call_model(m, example)) if t.is_floating_point()] for m in pair]
            if number and not all(bool(t.isfinite().all()) for t in outputs[0]):
                continue
            difference = relative_difference(outputs[1], outputs[0])
            if not difference <= TOLERANCE[torch.float64]:
                raise PlanError(
                    f"the widened network differs from the thin one by {difference:.1e} (relative): not returned; "
                    "please report this network"
                )


def _lift(thin: nn.Module, wide: nn.Module, layers: dict[str, LayerPlan], by: float) -> None:
    """Add `by` times |gamma| + |beta| to every beta of the thin network, and as much to the wide network's; in place."""
    for name, layer in layers.items():
        module = thin.get_submodule(name) if layer.kind == "norm" else None
        if isinstance(module, _BatchNorm) and module.weight is not None and module.bias is not None:
            amount = by * (module.weight.abs() + module.bias.abs())
            module.bias.add_(amount)
            other = wide.get_submodule(name)
            assert isinstance(other, _BatchNorm)
            other.bias.add_(_spread(amount, 0, layer.outs, 0))
