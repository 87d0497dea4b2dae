"""The specification of surgery, `mask`, and the proof that a thin network computes the same."""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimming.channels.copying import copy_model
from slimming.channels.inputs import call_model, draw_input, map_floats, tensors_in
from slimming.channels.plan import PruningPlan
from slimming.errors import PlanError

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the proof, relative to the largest output
OTHER_TOLERANCE = 5e-2  # half precision
STEPS = 8  # of rounding, by which an input is changed to see what the network makes of rounding
NOISE = 100  # times what the network makes of that may pass on the later inputs, which can make rounding large
DRAWS = ((1, 0), (3, 0), (10, 0), (1, 1), (3, 2))  # of the proof: (scale of the input, lift of the betas)
LARGE = 128  # pixels of a side; of larger images the later inputs are parts
STRIDE = 32  # pixels; a detector takes sides that are multiples of it


def mask(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Return a copy of the same size with gamma and beta of all pruned channels zero: the specification of `prune`.

    Of filters that write without a BatchNorm, those that the plan names (`zeroed`) are zero with their biases.

    Raises:
        PlanError: the plan is for another network, or names filters that this one does not have.
    """
    plan.check_model(model)
    masked = copy_model(model)
    with torch.no_grad():
        for name, keep in plan.keep.items():
            norm = masked.get_submodule(name)
            assert isinstance(norm, _BatchNorm)
            gone = torch.ones(norm.num_features, dtype=torch.bool, device=norm.weight.device)
            gone[keep] = False
            norm.weight[gone] = 0
            norm.bias[gone] = 0
        for name, channels in plan.zeroed.items():
            _zero_filters(masked, name, 1 if plan.layers[name].kind == "transposed" else 0, channels)
    return masked


def _zero_filters(masked: nn.Module, name: str, axis: int, channels: list[int]) -> None:
    """Set filters along an axis of a layer's weight, and their biases, to zero, in place."""
    layer = dict(masked.named_modules()).get(name)
    try:
        weight = masked.get_parameter(name) if layer is None else layer.get_parameter("weight")
        weight.index_fill_(axis, torch.tensor(channels, device=weight.device), 0)
        if isinstance(bias := getattr(layer, "bias", None), Tensor):
            bias[channels] = 0
    except (AttributeError, IndexError) as error:
        raise PlanError(f"plan: zeroed names filters of {name} that this network does not have") from error


def prove_sizes(model: nn.Module, thin: nn.Module, plan: PruningPlan) -> None:
    """Raise PlanError unless the two agree on one input: enough to see whether sizes fit, in half the time and less."""
    try:
        _compare(model, thin, plan, DRAWS[:1], _dtype_of(model))
    except PlanError:  # perhaps by rounding alone
        _compare(model, thin, plan, DRAWS[:1], torch.float64)


def prove(model: nn.Module, thin: nn.Module, plan: PruningPlan) -> None:
    """Raise PlanError unless `thin` and the masked model agree on seeded random inputs, without autocast.

    A channel that one input leaves at zero behind every ReLU could hold anything. So there are several inputs of different
    size, and for the later ones the same amount is added in both networks to every beta that stays, which wakes channels.
    Some networks (attention, say) make rounding large on such inputs; what they make of an input that differs by rounding
    alone then bounds what may pass. Of large images the later inputs are a part, half as high and wide, where the network
    takes that and the two agree on it.
    """
    dtype = _dtype_of(model)
    if dtype != torch.float64:
        try:  # the later inputs make rounding larger; in float64 it stays far below what an error changes
            _compare(model, thin, plan, DRAWS, torch.float64)
            return
        except _DoesNotRun:  # its code asks for a precision, or the device has no float64
            pass
    _compare(model, thin, plan, DRAWS, dtype)


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


class _DoesNotRun(PlanError):
    """A network fails on an input."""


def _compare(
    model: nn.Module, thin: nn.Module, plan: PruningPlan, draws: Sequence[tuple[int, int]], dtype: torch.dtype
) -> None:
    device = next(p.device for p in model.parameters() if p.is_floating_point())
    thin, masked = (m.to(dtype).eval() for m in (copy_model(thin), mask(model, plan)))
    layers = plan.compare == "layers" and bool(plan.layers)  # where nothing changes, no choice does
    watched = [(m, _watch_whole_layers(m, plan) if layers else None) for m in (thin, masked)]
    generator, part, allowed = torch.Generator().manual_seed(0), True, TOLERANCE.get(dtype, OTHER_TOLERANCE)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for number, (scale, lift) in enumerate(draws):
            try:
                drawn = draw_input(plan.spec, generator, device, dtype)
                example = map_floats(functools.partial(torch.mul, other=scale), drawn)
                if lift:
                    _lift(thin, masked, plan, lift)
                part = part and (number == 0 or _agree_on_part(watched, example, allowed))
                if number and part:
                    continue
                outputs = [_outputs(network, example, seen) for network, seen in watched]
            except Exception as error:
                raise _DoesNotRun(f"the pruned network does not run: {type(error).__name__}: {error}") from error
            if number and not all(bool(t.isfinite().all()) for t in outputs[1]):
                continue  # the first input is an ordinary one; what overflows at a larger one proves nothing
            difference, tolerance = relative_difference(*outputs), allowed
            if number and tolerance < difference < 1:
                nearly = map_floats(lambda x: _nearly(x, generator), example)
                noise = relative_difference(_outputs(masked, nearly, watched[1][1]), outputs[1])
                tolerance = max(tolerance, NOISE * noise if math.isfinite(noise) else 0)
            _judge(difference, tolerance)


def _agree_on_part(watched: Sequence[tuple[nn.Module, list[Tensor] | None]], example: Any, tolerance: float) -> bool:
    """Return whether two networks agree on a part of large images; False where there are none or only the whole is taken."""
    part = map_floats(_part, example)
    if [t.shape for t in tensors_in(part)] == [t.shape for t in tensors_in(example)]:
        return False
    try:
        return relative_difference(*(_outputs(network, part, seen) for network, seen in watched)) <= tolerance
    except Exception:  # another size than it was made for; the whole input decides
        return False


def _part(x: Tensor) -> Tensor:
    """Return the corner of images (N, C, H, W), their sides halved up to a multiple of STRIDE, where both are LARGE."""
    if x.ndim != 4 or min(x.shape[2:]) < LARGE:
        return x
    height, width = (math.ceil(side / 2 / STRIDE) * STRIDE for side in x.shape[2:])
    return x[..., :height, :width]


def _nearly(x: Tensor, generator: torch.Generator) -> Tensor:
    """Change the numbers of a tensor by some steps of rounding."""
    draw = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
    return x * (1 + STEPS * torch.finfo(x.dtype).eps * draw)


def _judge(difference: float, tolerance: float) -> None:
    if not difference <= tolerance:
        raise PlanError(
            f"the pruned network differs from the masked one by {difference:.1e} (relative): not returned; "
            "please report this network"
        )


def _outputs(network: nn.Module, example: Any, seen: list[Tensor] | None) -> list[Tensor]:
    """Return what the proof compares: the network's outputs, or the outputs of the watched layers."""
    if seen is None:
        return _floats(call_model(network, example))
    seen.clear()
    call_model(network, example)
    return _floats([*seen])


def _lift(thin: nn.Module, masked: nn.Module, plan: PruningPlan, by: float) -> None:
    """Add `by` times |gamma| + |beta| to every beta of the masked network that stays, and as much to the thin network's."""
    for name, norm in _affine_norms(masked):
        amount = by * (norm.weight.abs() + norm.bias.abs())  # 0 where the channel is pruned
        small, layer = thin.get_submodule(name), plan.layers.get(name)
        assert isinstance(small, _BatchNorm)
        kept = amount if layer is None else amount[layer.outs]
        for module, more in ((norm, amount), (small, kept)):  # new ones: the copy shares the network's own
            module._parameters["bias"] = nn.Parameter(module.bias + more, requires_grad=False)


def _affine_norms(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.weight is not None and module.bias is not None:
            yield name, module


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
        inf where shapes differ, or where only one side holds a value that is not finite.

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


def _floats(value: Any) -> list[Tensor]:
    return [t.double() for t in tensors_in(value) if t.is_floating_point()]
