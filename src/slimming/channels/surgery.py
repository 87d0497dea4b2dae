"""From a plan to a smaller network: `prune`, and its specification `mask`."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from slimming.channels.copying import copy_model
from slimming.channels.layers import set_indices
from slimming.channels.plan import LayerPlan, PruningPlan, draw_input
from slimming.channels.sizes import Attribute, attribute_name, has_sizes, read_attribute, write_attribute
from slimming.channels.watch import call_model, tensors_in
from slimming.errors import PlanError

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the proof, relative to the largest output
OTHER_TOLERANCE = 5e-2  # half precision
LATER = 1e3  # times as much for the later inputs, which make rounding larger
DRAWS = ((1, 0), (3, 0), (10, 0), (1, 1), (3, 2))  # of the proof: (scale of the input, lift of the betas)


def prune(model: nn.Module, plan: PruningPlan, *, verify: bool = True) -> nn.Module:
    """Return a smaller copy of the same class that computes what `mask(model, plan)` does.

    Args:
        model: the network that the plan was made for; it is not changed.
        verify: compare with the masked network on random inputs of the plan's input spec before returning.

    Raises:
        PlanError: the plan is for another network, or (verify) the two differ, which is a bug worth reporting.
    """
    plan.check_model(model)
    memo: dict[int, object] = {}
    modules = dict(model.named_modules())
    resized = {name: _slices(model, modules, name, layer) for name, layer in plan.layers.items()}
    for tensors in resized.values():
        for _, _, old, new in tensors:
            memo[id(old)] = new
    thin = copy_model(model, memo)
    for name, layer in plan.layers.items():
        _fit_attributes(thin, name, layer)
    _set_sizes(thin, plan)
    if verify:
        prove(model, thin, plan)
    return thin


def mask(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Return a copy of the same size with gamma and beta of all pruned channels zero: the specification of `prune`."""
    plan.check_model(model)
    masked = copy_model(model)
    with torch.no_grad():
        for name, keep in plan.keep.items():
            norm = masked.get_submodule(name)
            gone = torch.ones(norm.num_features, dtype=torch.bool, device=norm.weight.device)
            gone[keep] = False
            norm.weight[gone] = 0
            norm.bias[gone] = 0
    return masked


def prove(model: nn.Module, thin: nn.Module, plan: PruningPlan, draws: int = len(DRAWS)) -> None:
    """Raise PlanError unless `thin` and the masked model agree on seeded random inputs, without autocast.

    A channel that one input leaves at zero behind every ReLU could hold anything. So there are several inputs of different
    size, and the later ones meet both networks with the same amount added to every beta that stays, which wakes channels.

    Args:
        draws: how many of these inputs; 1 is enough to see whether sizes fit.
    """
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    if dtype != torch.float64:
        try:  # rounding, which the later inputs make larger in some networks, is then far below what an error changes
            _compare(model, thin, plan, DRAWS[:draws], torch.float64)
            return
        except _DoesNotRun:  # its code asks for a precision, or the device has no float64
            pass
    _compare(model, thin, plan, DRAWS[:draws], dtype)


class _DoesNotRun(PlanError):
    """A network fails on an input."""


def _compare(
    model: nn.Module, thin: nn.Module, plan: PruningPlan, draws: tuple[tuple[int, int], ...], dtype: torch.dtype
) -> None:
    device = next(p.device for p in model.parameters() if p.is_floating_point())
    thin, masked = (m.to(dtype).eval() for m in (copy_model(thin), mask(model, plan)))
    layers = plan.compare == "layers" and bool(plan.layers)  # where nothing changes, no choice does
    watched = [(m, _watch_whole_layers(m, plan) if layers else None) for m in (thin, masked)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for number, (scale, lift) in enumerate(draws):
            try:
                example = _scaled(draw_input(plan.spec, generator, device, dtype), scale)
                _lift(thin, masked, plan, lift)
                outputs = [_outputs(network, example, seen) for network, seen in watched]
            except Exception as error:
                raise _DoesNotRun(f"the pruned network does not run: {type(error).__name__}: {error}") from error
            if number and not all(bool(t.isfinite().all()) for t in outputs[1]):
                continue  # the first input is an ordinary one; what overflows at a larger one proves nothing
            _judge(relative_difference(*outputs), TOLERANCE.get(dtype, OTHER_TOLERANCE) * (LATER if number else 1))


def _judge(difference: float, tolerance: float) -> None:
    if not difference <= tolerance:
        raise PlanError(
            f"the pruned network differs from the masked one by {difference:.1e} (relative): not returned; "
            "please report this network"
        )


def _outputs(network: nn.Module, example, seen: list[Tensor] | None) -> list[Tensor]:
    """Return what the proof compares: the network's outputs, or what the watched layers gave."""
    if seen is None:
        return _floats(call_model(network, example))
    seen.clear()
    call_model(network, example)
    return _floats([*seen])


def _lift(thin: nn.Module, masked: nn.Module, plan: PruningPlan, by: float) -> None:
    """Add `by` times |gamma| + |beta| to every beta of the masked network that stays, and as much to the thin network's."""
    for name, norm in masked.named_modules():
        if (
            by
            and isinstance(norm, nn.modules.batchnorm._BatchNorm)
            and norm.weight is not None
            and norm.bias is not None
        ):
            amount = by * (norm.weight.abs() + norm.bias.abs())  # 0 where the channel is pruned
            small, layer = thin.get_submodule(name), plan.layers.get(name)
            kept = amount if layer is None else amount[layer.outs]
            for module, more in ((norm, amount), (small, kept)):  # new ones: the copy shares the network's own
                module._parameters["bias"] = nn.Parameter(module.bias + more, requires_grad=False)


def _scaled(value, scale: float):
    """Multiply all floats of an example input."""
    if isinstance(value, Tensor):
        return value * scale if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: _scaled(v, scale) for k, v in value.items()}
    return type(value)(_scaled(v, scale) for v in value) if isinstance(value, list | tuple) else value


def _watch_whole_layers(network: nn.Module, plan: PruningPlan) -> list[Tensor]:
    """Return a list that fills with the outputs of all layers that the plan leaves every output channel."""
    seen: list[Tensor] = []
    for name, layer in plan.layers.items():
        if len(layer.outs) == layer.size[1] and layer.kind in ("conv", "linear"):
            network.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append(out))
    return seen


def relative_difference(a: list[Tensor], b: list[Tensor]) -> float:
    """Return the largest |a - b| over the largest |b|, over lists of tensors of equal shapes.

    Returns:
        inf where shapes differ, or where one side alone holds a value that is not finite.

    Raises:
        PlanError: there is nothing to compare, or neither side is finite: both would pass as equal.
    """
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x.numel()]
    if not pairs:
        raise PlanError("the network returns no float output to compare, so that nothing can be proven (verify=False)")
    finite = [tuple(bool(t.isfinite().all()) for t in pair) for pair in pairs]
    if any(x != y for x, y in finite):
        return float("inf")
    if (False, False) in finite:
        raise PlanError("the network itself is not finite on this input: nothing can be proven")
    return max(_distance(x, y) for x, y in pairs)


def _distance(x: Tensor, y: Tensor) -> float:
    scale = float(y.abs().max())
    return float((x - y).abs().max()) / (scale or 1)


def _floats(value) -> list[Tensor]:
    return [t.double() for t in tensors_in(value) if t.is_floating_point()]


def prune_optimizer_state(state: dict, model: nn.Module, plan: PruningPlan, names: Iterable[str]) -> dict:
    """Slice the per-parameter tensors of an optimizer's state dict as `prune` slices the parameters.

    Args:
        state: `optimizer.state_dict()` of an optimizer over the dense model's parameters.
        model: the dense model.
        names: names of the parameters in the order in which the optimizer was given them.

    Returns:
        A state dict for an optimizer over the pruned model's parameters in the same order.
    """
    axes: dict[str, list[tuple[int, Tensor]]] = {}
    for layer_name, layer in plan.layers.items():
        for attribute, tensor in _tensors_of(model, dict(model.named_modules()), layer_name):
            full = f"{layer_name}.{attribute}" if attribute else layer_name
            axes[full] = [(axis, torch.tensor(indices)) for axis, indices in _axes(layer, tensor)]
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


def _tensors_of(model: nn.Module, modules: dict[str, nn.Module], name: str) -> list[tuple[str, Tensor]]:
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


def _axes(layer: LayerPlan, tensor: Tensor) -> list[tuple[int, list[int]]]:
    """Return which indices of which axes of a parameter or buffer stay."""
    if layer.kind == "scale":
        return [(axis, layer.outs) for axis, size in enumerate(tensor.shape) if size > 1]
    if tensor.ndim == 1:  # bias, and everything of a norm
        return [(0, layer.outs)]
    if layer.kind == "depthwise":
        return [(0, layer.outs)]
    return [(0, layer.ins), (1, layer.outs)] if layer.kind == "transposed" else [(0, layer.outs), (1, layer.ins)]


def _take(tensor: Tensor, axes: Iterable[tuple[int, Tensor]]) -> Tensor:
    """Return a tensor of its own with the indices of some axes."""
    thin = tensor.detach()
    for axis, indices in axes:
        if len(indices) < thin.shape[axis]:
            thin = thin.index_select(axis, indices.to(thin.device))
    return thin.clone() if thin.data_ptr() == tensor.data_ptr() else thin


def _slices(model: nn.Module, modules: dict, name: str, layer: LayerPlan) -> list[tuple[str, str, Tensor, Tensor]]:
    found = []
    kept = {id(indices): torch.tensor(indices) for indices in (layer.ins, layer.outs)}
    for attribute, old in _tensors_of(model, modules, name):
        axes = _axes(layer, old)
        for axis, indices in axes:
            here, planned = old.shape[axis], layer.size[0 if indices is layer.ins else 1]
            if here != planned:
                raise PlanError(f"plan: layer {name} has {here} channels in this network, {planned} in the plan")
        new = _take(old, [(axis, kept[id(indices)]) for axis, indices in axes])
        if old.ndim == 4 and old.is_contiguous(memory_format=torch.channels_last):
            new = new.contiguous(memory_format=torch.channels_last)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        found.append((name, attribute, old, new))
    return found


def _fit_attributes(model: nn.Module, name: str, layer: LayerPlan) -> None:
    """Make a layer's own numbers say its new size; let a norm whose sides differ select and scatter."""
    if layer.kind == "scale":
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.PReLU):
            owner.num_parameters = len(layer.outs)
        return
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return
    if layer.kind == "norm":
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise PlanError(f"plan: layer {name} is no BatchNorm in this network")
        if layer.width > max(layer.size[1], getattr(module, "width", 0)):
            raise PlanError(f"plan: width of layer {name} must not be more than its channels, got {layer.width}")
        module.num_features = len(layer.outs)
        select, scatter = (None if i is None else torch.tensor(i) for i in (layer.select, layer.scatter))
        set_indices(module, select, scatter, layer.width)
        return
    if hasattr(module, "in_channels"):
        groups = module.groups if layer.kind == "grouped" else 1
        module.in_channels, module.out_channels = len(layer.ins) * groups, len(layer.outs)
        if layer.kind == "depthwise":
            module.groups = len(layer.ins)
    elif hasattr(module, "in_features"):
        module.in_features, module.out_features = len(layer.ins), len(layer.outs)


def _set_sizes(model: nn.Module, plan: PruningPlan) -> None:
    """Set the sizes that modules keep in attributes."""
    for module, name, position, value in plan.attributes:
        attribute = (module, name, position)
        if not 0 <= value <= _size(model, attribute):
            raise PlanError(f"plan: {attribute_name(attribute)} is not a size in this network that {value} can follow")
        write_attribute(model, attribute, value)


def _size(model: nn.Module, attribute: Attribute) -> int:
    """Return the size in an attribute of a module's own, -1 if that is none."""
    try:
        owner = model.get_submodule(attribute[0])
        known = has_sizes(owner) and isinstance(vars(owner)[attribute[1]], int | list | tuple)
        value = read_attribute(model, attribute) if known else None
    except (AttributeError, IndexError, KeyError, TypeError):
        return -1
    return value if type(value) is int else -1
