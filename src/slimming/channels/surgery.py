"""From a plan to a smaller network, and to an optimizer's state that fits it."""

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slimming.channels.copying import copy_model
from slimming.channels.layers import set_indices
from slimming.channels.plan import LayerPlan, PruningPlan
from slimming.channels.proof import prove
from slimming.channels.sizes import Attribute, attribute_name, has_sizes, read_attribute, write_attribute
from slimming.errors import PlanError

Axes = Iterable[tuple[int, Tensor]]  # axes of a tensor with the indices that stay


def prune(model: nn.Module, plan: PruningPlan, *, verify: bool = True) -> nn.Module:
    """Return a smaller copy of the same class that computes what `mask(model, plan)` does.

    Args:
        model: the network that the plan was made for; it is not changed.
        verify: compare with the masked network on random inputs of the plan's input spec before returning.

    Raises:
        PlanError: the plan is for another network, or (verify) the two differ, which is a bug worth reporting.
    """
    plan.check_model(model)
    modules = dict(model.named_modules())
    resized = [tensors for name, layer in plan.layers.items() for tensors in _slices(model, modules, name, layer)]
    thin = copy_model(model, {id(old): new for old, new in resized})
    for name, layer in plan.layers.items():
        fit_attributes(thin, name, layer)
    _set_sizes(thin, plan)
    if verify:
        prove(model, thin, plan)
    return thin


def prune_optimizer_state(
    state: dict[str, Any], model: nn.Module, plan: PruningPlan, names: Iterable[str]
) -> dict[str, Any]:
    """Slice the per-parameter tensors of an optimizer's state dict as `prune` slices the parameters.

    Args:
        state: `optimizer.state_dict()` of an optimizer over the dense model's parameters.
        model: the dense model.
        names: names of the parameters in the order in which the optimizer was given them.

    Returns:
        A state dict for an optimizer over the pruned model's parameters in the same order.
    """
    axes: dict[str, Axes] = {}
    modules = dict(model.named_modules())
    for layer_name, layer in plan.layers.items():
        for attribute, tensor in tensors_of(model, modules, layer_name):
            full = f"{layer_name}.{attribute}" if attribute else layer_name
            axes[full] = [(axis, torch.tensor(indices)) for axis, indices in axes_of(layer, tensor)]
    new = copy.deepcopy({k: v for k, v in state.items() if k != "state"})
    new["state"] = {}
    parameters = dict(model.named_parameters())
    for index, name in enumerate(names):
        entry = state["state"].get(index)
        if entry is None:
            continue
        new["state"][index] = {
            key: _take(value, axes.get(name, ()))
            if isinstance(value, Tensor) and value.shape == parameters[name].shape
            else copy.deepcopy(value)
            for key, value in entry.items()
        }
    return new


def tensors_of(model: nn.Module, modules: dict[str, nn.Module], name: str) -> list[tuple[str, Tensor]]:
    """Return (attribute, tensor) of a layer; attribute "" for a parameter that its parent holds directly."""
    if name not in modules:
        try:
            owner, _, attribute = name.rpartition(".")
            tensor = getattr(model.get_submodule(owner), attribute)
            if not isinstance(tensor, Tensor):
                raise AttributeError(name)
            return [("", tensor)]
        except AttributeError as error:
            raise PlanError(f"plan: this network has no layer {name}") from error
    tensors = [*modules[name]._parameters.items(), *modules[name]._buffers.items()]
    return [(k, t) for k, t in tensors if t is not None and k not in ("select", "scatter", "num_batches_tracked")]


def axes_of(layer: LayerPlan, tensor: Tensor) -> list[tuple[int, list[int]]]:
    """Return which indices of which axes of a parameter or buffer stay."""
    if layer.kind == "scale":
        return [(axis, layer.outs) for axis, size in enumerate(tensor.shape) if size > 1]
    if tensor.ndim == 1 or layer.kind == "depthwise":  # a bias, everything of a norm
        return [(0, layer.outs)]
    return [(0, layer.ins), (1, layer.outs)] if layer.kind == "transposed" else [(0, layer.outs), (1, layer.ins)]


def _take(tensor: Tensor, axes: Axes) -> Tensor:
    """Return a tensor of its own with the indices of some axes."""
    thin = tensor.detach()
    for axis, indices in axes:
        if len(indices) < thin.shape[axis]:
            thin = thin.index_select(axis, indices.to(thin.device))
    return thin.clone() if thin.data_ptr() == tensor.data_ptr() else thin


class Resized(NamedTuple):
    """A parameter or buffer of the network, and what takes its place in the thin one."""

    old: Tensor
    new: Tensor


def _slices(model: nn.Module, modules: dict[str, nn.Module], name: str, layer: LayerPlan) -> list[Resized]:
    found = []
    kept = {id(indices): torch.tensor(indices) for indices in (layer.ins, layer.outs)}
    for _, old in tensors_of(model, modules, name):
        axes = axes_of(layer, old)
        for axis, indices in axes:
            here, planned = old.shape[axis], layer.size[0 if indices is layer.ins else 1]
            if here != planned:
                raise PlanError(f"plan: layer {name} has {here} channels in this network, {planned} in the plan")
        new = _take(old, [(axis, kept[id(indices)]) for axis, indices in axes])
        if old.ndim == 4 and old.is_contiguous(memory_format=torch.channels_last):
            new = new.contiguous(memory_format=torch.channels_last)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        found.append(Resized(old, new))
    return found


def fit_attributes(model: nn.Module, name: str, layer: LayerPlan) -> None:
    """Give a layer's own numbers its new size, and a norm whose sides differ its indices."""
    if layer.kind == "scale":
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.PReLU):
            owner.num_parameters = len(layer.outs)
        return
    try:
        module = model.get_submodule(name)
    except AttributeError:  # a parameter that forward uses as a weight
        return
    if layer.kind == "norm":
        _fit_norm(module, name, layer)
        return
    sizes: dict[str, int] = {}  # of torch's layers, and of other classes that use its names
    if hasattr(module, "in_channels"):
        groups = getattr(module, "groups", 1) if layer.kind == "grouped" else 1
        sizes = {"in_channels": len(layer.ins) * groups, "out_channels": len(layer.outs)}
        if layer.kind == "depthwise":
            sizes["groups"] = len(layer.ins)
    elif hasattr(module, "in_features"):
        sizes = {"in_features": len(layer.ins), "out_features": len(layer.outs)}
    for attribute, value in sizes.items():
        setattr(module, attribute, value)


def _fit_norm(module: nn.Module, name: str, layer: LayerPlan) -> None:
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        raise PlanError(f"plan: layer {name} is no BatchNorm in this network")
    if layer.width > max(layer.size[1], getattr(module, "width", 0)):
        raise PlanError(f"plan: width of layer {name} must not be more than its channels, got {layer.width}")
    module.num_features = len(layer.outs)
    select, scatter = (None if i is None else torch.tensor(i) for i in (layer.select, layer.scatter))
    set_indices(module, select, scatter, layer.width)


def _set_sizes(model: nn.Module, plan: PruningPlan) -> None:
    """Set the sizes that modules keep in attributes."""
    for module, name, position, value in plan.attributes:
        attribute = (module, name, position)
        if not 0 <= value <= _size(model, attribute):
            raise PlanError(f"plan: {attribute_name(attribute)} is not a size in this network that {value} can follow")
        write_attribute(model, attribute, value)


def _size(model: nn.Module, attribute: Attribute) -> int:
    """Return the size that an attribute of a module holds, -1 if it holds none."""
    try:
        owner = model.get_submodule(attribute[0])
        known = has_sizes(owner) and isinstance(vars(owner)[attribute[1]], int | list | tuple)
        value = read_attribute(model, attribute) if known else None
    except (AttributeError, IndexError, KeyError, TypeError):
        return -1
    return value if type(value) is int else -1
