"""Repair: the layers of a pruned network are refitted, without labels, to what the dense network's layers compute.

A layer that lost inputs gets new weights for those that it kept: by least squares, the weights whose outputs come nearest to
the dense layer's outputs on some images. The layers are refitted in the order in which they run, each on what the layers
before it, refitted already, make of the images. So both networks run once, side by side, on all images as one batch.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimming.channels.copying import copy_model, shallow_copy
from slimming.channels.owners import Owner
from slimming.channels.plan import PruningPlan
from slimming.channels.repair.least_squares import Applied, Equations, applied, at, draw_positions
from slimming.channels.repair.lockstep import handed_over
from slimming.channels.repair.survey import LayerCalls, Survey
from slimming.errors import GraphError, PlanError

RIDGE = 1e-3  # of the mean of the Gram matrix's diagonal
ROWS = 2**15  # positions of a layer's outputs, over all images, that its fit looks at
LARGEST = 2**14  # inputs of one output; the Gram matrix then takes 2 GiB, and as much again while it is solved
MEMORY = 2**32  # bytes that all images may take in one operator of both networks
SAME = 1e-5  # relative: a layer that differs by less from the dense one needs no repair


class Repaired(NamedTuple):
    """What `refit` returns.

    Attributes:
        model: the repaired network, in eval mode.
        layers: those that were refitted, in the order in which they run.
        left: those that lost inputs and stay as they are, each with the reason.
    """

    model: nn.Module
    layers: list[str]
    left: dict[str, str]


def repair(
    model: nn.Module, thin: nn.Module, plan: PruningPlan, batches: Iterable[Tensor], ridge: float = RIDGE
) -> nn.Module:
    """Return a copy of a thin network, in eval mode, whose layers give nearly what the dense network's give.

    Args:
        model: the dense network.
        thin: `prune(model, plan)`, not calibrated: the dense outputs are normalised by the dense statistics.
        plan: that led from one to the other.
        batches: inputs (N, C, H, W) as in training, on the networks' device; or (inputs, labels). About 2000 images.
        ridge: how strongly the old weights hold, relative to the inputs' mean square.

    Raises:
        GraphError: no batches, more images than MEMORY holds, or equations without a solution, with the layer's name.
        PlanError: a network that is not the plan's.
    """
    return refit(model, thin, plan, batches, ridge).model


def refit(
    model: nn.Module, thin: nn.Module, plan: PruningPlan, batches: Iterable[Tensor], ridge: float = RIDGE
) -> Repaired:
    """Do what `repair` does, and say which layers were refitted and which were left."""
    _check_networks(model, thin, plan)
    given = [batch[0] if isinstance(batch, list | tuple) else batch for batch in batches]
    if not given:
        raise GraphError("repair needs images: give at least one batch")
    images = torch.cat(given)
    dense, repaired = shallow_copy(model).eval(), copy_model(thin).eval()
    surveys = [Survey(network) for network in (dense, repaired)]
    for survey in surveys:
        survey.run(images[:2])
    _check_memory(surveys, len(images))
    runs = surveys[1].calls
    thin_run = _Thin(repaired, plan, surveys[1], ridge)
    often = {name for name in runs if runs[name] > 1}
    for layers in (often, runs.keys() - often):  # what runs several times must be known when it first runs
        if layers:
            thin_run.refit(layers, dense, images)
    return Repaired(repaired, [name for name in runs if name in thin_run.refitted], _left(plan, thin_run))


def _check_networks(model: nn.Module, thin: nn.Module, plan: PruningPlan) -> None:
    plan.check_model(model)
    norms = {name: m.num_features for name, m in thin.named_modules() if isinstance(m, _BatchNorm)}
    if odd := [name for name, kept in plan.keep.items() if norms.get(name) != len(kept)]:
        raise PlanError(f"repair: {odd[0]} of the thin network is not what prune(model, plan) makes of it")


def _check_memory(surveys: list[Survey], images: int) -> None:
    needed = sum(survey.largest for survey in surveys)
    if images * needed > MEMORY:
        raise GraphError(
            f"repair of {images} images takes {images * needed / 1e9:.1f} GB in one operator of both networks, of "
            f"{MEMORY / 1e9:.1f} GB that it may take: give at most {MEMORY // needed} images (repair.images)"
        )


def _left(plan: PruningPlan, thin_run: "_Thin") -> dict[str, str]:
    """Return which layers lost inputs and were not looked at, and why."""
    weighed = {n: layer for n, layer in plan.layers.items() if layer.kind not in ("norm", "scale")}
    lost = [n for n, layer in weighed.items() if len(layer.ins) < layer.size[0] and n not in thin_run.seen]
    reasons = {"transposed": "a transposed convolution"}
    left = {n: reasons.get(weighed[n].kind, "its weight is not used by a convolution or linear operator") for n in lost}
    return left | thin_run.left


class _Dense(LayerCalls):
    """Hands over the outputs of some layers of the dense network."""

    def __init__(self, model: nn.Module, layers: Set[str], hand_over: Callable[[tuple[str, Tensor]], None]) -> None:
        super().__init__(model)
        self.layers, self.hand_over = layers, hand_over

    def layer(self, owner: Owner, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        if owner.layer in self.layers:
            self.hand_over((owner.layer, out))
        return out


class _Thin(LayerCalls):
    """Refits layers of the thin network, in place, as they run.

    Attributes:
        refitted: layers that have new weights.
        seen: layers that were compared with the dense network's.
        left: layers that stay as they are, with the reason.
    """

    def __init__(self, model: nn.Module, plan: PruningPlan, survey: Survey, ridge: float) -> None:
        super().__init__(model)
        self.plan, self.survey, self.ridge = plan, survey, ridge
        self.refitted: set[str] = set()
        self.seen: set[str] = set()
        self.left: dict[str, str] = {}

    def refit(self, layers: Set[str], dense: nn.Module, images: Tensor) -> None:
        """Refit these layers; both networks run once."""
        self.layers, self.images = layers, len(images)
        self.equations: dict[str, Equations] = {}
        self.left_to_run = Counter({name: self.survey.calls[name] for name in layers})

        def run_dense(hand_over: Callable[[tuple[str, Tensor]], None]) -> None:
            _Dense(dense, layers, hand_over).run(images)

        with contextlib.closing(handed_over(run_dense)) as self.targets:
            self.run(images)

    def layer(self, owner: Owner, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        if owner.layer not in self.layers:
            return out
        name, target = next(self.targets, ("nothing", out))
        if name != owner.layer:
            raise GraphError(f"repair: the thin network runs {owner.layer} where the dense one runs {name}")
        if self.plan.compare == "layers" and len(out) != self.images:
            self.left[name] = "it runs on parts of images, of which both networks may choose others"
            return out
        if not self._fits(owner.layer, applied(func, args, kwargs), out, target):
            return out
        del out
        return func(*args, **kwargs)  # with the new weights

    def _fits(self, name: str, call: Applied, out: Tensor, target: Tensor) -> bool:
        """Compare a call with the dense network's; return whether the layer got new weights."""
        if call.weight.ndim == 2:  # a linear layer: (N, ..., C) -> (rows, C)
            out, target = (t.reshape(-1, t.shape[-1]) for t in (out, target))
        positions = draw_positions(out, ROWS)
        wanted = at(target, positions)
        if name in self.plan.layers:
            wanted = wanted[:, torch.tensor(self.plan.layers[name].outs, device=wanted.device)]
        lack = wanted - at(out, positions)
        self.seen.add(name)
        self.left_to_run[name] -= 1
        if self.survey.calls[name] == 1 and bool(lack.norm() <= SAME * wanted.norm()):
            return False
        inputs = call.weight[0].numel()
        if call.groups * inputs**2 > LARGEST**2:
            self.left[name] = f"{inputs:,} inputs to one output, more than {LARGEST:,}"
            return False
        equations = self.equations.setdefault(name, Equations(call.weight, call.groups))
        equations.add(call, positions, lack)
        if self.left_to_run[name]:
            return False
        self._solve(name, call, self.equations.pop(name))
        return True

    def _solve(self, name: str, call: Applied, equations: Equations) -> None:
        """Change the layer's weights; an intercept goes into its bias, or into the mean of the BatchNorm behind it."""
        bias = call.bias if name in self.survey.biased else None
        norm = self.model.get_submodule(self.survey.norm_behind(name)) if bias is None else None
        mean = norm.running_mean if isinstance(norm, _BatchNorm) else None
        try:
            change, shift = equations.solve(self.ridge, intercept=bias is not None or mean is not None)
        except GraphError as error:
            raise GraphError(f"repair of {name}: {error}") from error
        call.weight.add_(change)
        if bias is not None:
            bias.add_(shift)
        elif mean is not None:
            mean.sub_(shift)
        self.refitted.add(name)
