"""Writing a plan: from what lives to the indices that every layer keeps."""

from typing import Any

import torch
from torch import Tensor

from slimming.channels.criteria import Choice
from slimming.channels.graph.liveness import Solution
from slimming.channels.graph.structure import Step, Structure
from slimming.channels.plan import LayerPlan
from slimming.channels.sizes import new_values
from slimming.channels.tape import WITH_FILTERS
from slimming.errors import PlanError


def layer_plans(graph: Structure, solution: Solution) -> dict[str, LayerPlan]:
    """Return what stays of every layer that changes."""
    plans = {
        name: _norm_plan(graph, step, solution) if step.use.kind == "norm" else _weight_plan(step, solution.live)
        for name, step in graph.layers.items()
    }
    return {name: plan for name, plan in plans.items() if plan is not None}


def _weight_plan(step: Step, live: Tensor) -> LayerPlan | None:
    use, reads, writes = step.use, live.index_select(0, step.reads), live.index_select(0, step.writes)
    if bool(reads.all()) and bool(writes.all()):
        return None
    size = (len(reads), len(writes))
    if use.kind == "grouped":
        reads = reads.view(use.groups, -1)[0]
        size = (len(reads), size[1])
    return LayerPlan(use.kind, _indices(reads), _indices(writes), size)


def _norm_plan(graph: Structure, step: Step, solution: Solution) -> LayerPlan | None:
    use, live = step.use, solution.live
    assert use.source is not None and use.target is not None
    kept = live[step.writes] if step.norm is None else solution.kept[step.norm.all]
    module = graph.modules[use.name]
    old_select, old_scatter = (getattr(module, side, None) for side in ("select", "scatter"))  # of a SelectBatchNorm
    indices = _indices(kept)
    source, target = live[graph.component[use.source]], live[graph.component[use.target]]
    width = int(target.count_nonzero())
    select = _position_among_kept(source, old_select, kept)
    scatter = _position_among_kept(target, old_scatter, kept)
    before = [None if t is None else t.tolist() for t in (old_select, old_scatter)]
    if len(indices) == len(kept) and [select, scatter] == before and width == len(target):
        return None
    return LayerPlan("norm", indices, indices, (len(kept), len(kept)), select, scatter, width)


def _position_among_kept(stays: Tensor, index: Tensor | None, kept: Tensor) -> list[int] | None:
    """Return where the kept channels of a norm lie among the channels of a tensor that stay; None: all of them, in order.

    Args:
        stays: (C_tensor,) bool, the tensor's channels that stay.
        index: (C,) the tensor's channel for each channel of the norm; None: the same.
        kept: (C,) bool, the norm's channels that stay.
    """
    if index is None and torch.equal(stays, kept):
        return None
    position = stays.long().cumsum(0) - 1
    found: list[int] = (position if index is None else position[index.cpu()])[kept].tolist()
    return None if found == list(range(int(stays.count_nonzero()))) else found


def _indices(mask: Tensor) -> list[int]:
    indices: list[int] = mask.nonzero().flatten().tolist()
    return indices


def zeroed_filters(graph: Structure, solution: Solution) -> dict[str, list[int]]:
    """Return the filters that have to be zero in the masked network: of classes that go, where no BatchNorm writes them."""
    silenced = graph.silenced(solution.kept)
    if silenced is None:
        return {}
    found = {n: _indices(silenced[s.use.write]) for n, s in graph.layers.items() if s.use.kind in WITH_FILTERS}
    return {name: channels for name, channels in found.items() if channels}


def attribute_values(graph: Structure, solution: Solution) -> list[list[Any]]:
    """Return the sizes in attributes that change; see PruningPlan."""
    counts = [(r.size, int(solution.live[graph.component[r.atoms]].sum())) for r in graph.tape.resizes]
    try:
        return [[*attribute, value] for attribute, value in new_values(counts, graph.model).items()]
    except ValueError as error:
        raise PlanError(f"sizes kept in attributes cannot follow this choice: {error}") from error


def describe_outcome(choice: Choice, removed: Tensor, solution: Solution) -> dict[str, Any]:
    """Return the counts of `PruningPlan.got` for what was asked to go, `removed` (U,) bool, and what stays."""
    chosen, stays = removed[choice.unit], solution.kept[choice.gammas]
    gone = int((chosen & ~stays).sum())
    return {
        "removed": gone,
        "candidates": len(choice.gammas),
        "ratio": gone / len(choice.gammas),
        "restored": int((chosen & stays).sum()),
        "dead": int((~solution.kept).sum()) - gone,
    }
