"""A network at the width that it had before channels left it in training: zeros stand for what has left."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimming.channels.plan import PruningPlan
from slimming.channels.surgery import axes_of, prune, tensors_of


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
