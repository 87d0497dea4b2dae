"""A network at the width that it had before channels left it in training, zeros for what has left; and its pruning."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimming.channels.criteria import Criterion
from slimming.channels.graph import ChannelGraph
from slimming.channels.latency import Latency
from slimming.channels.plan import PruningPlan
from slimming.channels.surgery import axes_of, prune, tensors_of
from slimming.training.shrinking import Chosen


def at_full_width(wide: nn.Module, thin: nn.Module, plans: Sequence[dict[str, Any]]) -> nn.Module:
    """Return a network as it was before some plans, with the weights after them; in eval mode.

    Gammas and betas of the channels that left are zero, so that it computes what the thin network does: it is the mask of the
    plans' specification.

    Args:
        wide: the network before the plans, of any weights.
        thin: the network that the plans lead to.
        plans: in order.
    """
    networks = [wide]
    for plan in plans:
        networks.append(prune(networks[-1], PruningPlan.from_dict(plan), verify=False))
    networks[-1] = thin
    for before, after, plan in reversed(list(zip(networks[:-1], networks[1:], plans, strict=True))):
        _fill(before, after, PruningPlan.from_dict(plan))
    return wide.to(next(thin.parameters()).dtype).eval()


@torch.no_grad()
def _fill(wide: nn.Module, thin: nn.Module, plan: PruningPlan) -> None:
    """Give one network the weights of the one that a plan makes of it, and zeros elsewhere."""
    modules, axes = dict(wide.named_modules()), {}
    for name, layer in plan.layers.items():
        for attribute, tensor in tensors_of(wide, modules, name):
            axes[f"{name}.{attribute}" if attribute else name] = axes_of(layer, tensor)
    weights = thin.state_dict()
    for key, target in wide.state_dict().items():
        target.copy_(_spread(weights[key], target.shape, axes.get(key, [])))


def _spread(value: Tensor, shape: torch.Size, axes: list[tuple[int, list[int]]]) -> Tensor:
    """Put the numbers of a tensor at the indices of some axes of a larger one that is zero elsewhere."""
    for axis, indices in axes:
        size = [*value.shape[:axis], shape[axis], *value.shape[axis + 1 :]]
        value = value.new_zeros(size).index_copy_(axis, torch.tensor(indices), value)
    return value


def left_in_training(graph: ChannelGraph) -> Tensor:
    """Return which gammas have left the network in training: they and their betas are exactly zero, (all gammas,) bool."""
    left = torch.zeros(graph.count, dtype=torch.bool)
    for norm in graph.norms.values():
        beta = norm.module.bias
        left[norm.all] = (norm.module.weight == 0) & (beta == 0 if beta is not None else True)
    return left


def planned_first(
    graph: ChannelGraph,
    criterion: Criterion,
    scores: Tensor,
    left: Tensor,
    options: dict[str, Any],
) -> PruningPlan:
    """Make a plan for a network that was shrunk in training: what has left counts as removed, and first.

    It stays away where less is asked for as well.
    """
    if isinstance(criterion, Latency):  # measures what it plans, so that nothing may be added afterwards
        criterion.left = left
    scores[left] = -torch.finfo(torch.float64).tiny  # below a gamma of 0; its square is 0
    given = {name: scores[norm.all] for name, norm in graph.norms.items()}
    plan = graph.plan(criterion, **options | {"score": given})
    kept = torch.zeros(graph.count, dtype=torch.bool)
    for name, norm in graph.norms.items():
        kept[norm.start + torch.tensor(plan.keep.get(name, range(norm.module.num_features)))] = True
    if not isinstance(criterion, Latency) and bool(
        (kept & left & graph.candidates(options["ties"], options["ignore"])).any()
    ):
        alone, plan = plan, graph.plan(Chosen(left | ~kept, plan.asked), **options | {"score": given})
        if plan.got["removed"] > alone.got["removed"]:  # the constraints did not want them back
            print(f"more has left in training already: with that, {plan.got['ratio']:.1%} of the channels go")
    if plan.got["highest_score"] is not None:
        plan.got["highest_score"] = max(0.0, plan.got["highest_score"])
    plan.asked = {k: v for k, v in plan.asked.items() if k != "score"}
    if options["score"] != "gamma":
        plan.asked["score"] = options["score"]
    return plan
