"""Ways to break the surgery, each a small named function; `sabotage.py` says what they get and how they are judged."""

import dataclasses
import itertools
import random
from collections.abc import Callable

import torch
from sabotage import NotHere, Scene, code, mask, network, plan
from torch import nn

from slimming.channels import proof, surgery
from slimming.channels.layers import SelectBatchNorm

# --- the plan from which the thin network is made ---------------------------------------------------------------------

READERS = ("conv", "linear", "transposed", "grouped")
WRITERS = ("conv", "linear", "transposed", "grouped", "depthwise")


def _other(kept: list[int], size: int, pick: random.Random, near: bool = False) -> list[int]:
    """Return the indices with one of them exchanged for one that was not kept; `near`: for its neighbour."""
    gone = set(range(size)) - set(kept)
    pairs = [(i, g) for i in kept for g in ((i + 1, i - 1) if near else gone) if g in gone]
    if not pairs:
        raise NotHere
    old, new = pick.choice(pairs)
    return sorted({*kept, new} - {old})


def _swapped(values: list[int], pick: random.Random) -> list[int]:
    if len(values) < 2:
        raise NotHere
    i, j = pick.sample(range(len(values)), 2)
    values = list(values)
    values[i], values[j] = values[j], values[i]
    return values


def _change(here: Scene, side: str, kinds: tuple[str, ...], change: Callable[[list[int]], list[int]]) -> None:
    """Change one side of one layer of the plan; a side that keeps everything is not sliced, whatever its indices say."""
    sliced = {"ins": _thinned(0), "outs": _thinned(1)}.get(side, lambda layer: True)
    name = here.layer(*kinds, where=lambda layer: sliced(layer) and len(getattr(layer, side) or ()) > 1)
    layer = here.plan.layers[name]
    before = getattr(layer, side)
    here.plan.layers[name] = dataclasses.replace(layer, **{side: change(before)})
    if here.plan.layers[name] == layer:
        raise NotHere


def _thinned(side: int):
    return lambda layer: len((layer.ins, layer.outs)[side]) < layer.size[side]


@plan
def input_index_off_by_one(here):
    name = here.layer(*READERS, where=_thinned(0))
    layer = here.plan.layers[name]
    layer.ins = _other(layer.ins, layer.size[0], here.pick, near=True)


@plan
def output_index_off_by_one(here):
    name = here.layer(*WRITERS, where=_thinned(1))
    layer = here.plan.layers[name]
    layer.outs = _other(layer.outs, layer.size[1], here.pick, near=True)


@plan
def another_input_kept(here):
    name = here.layer(*READERS, where=_thinned(0))
    layer = here.plan.layers[name]
    layer.ins = _other(layer.ins, layer.size[0], here.pick)


@plan
def another_filter_kept(here):
    name = here.layer(*WRITERS, where=_thinned(1))
    layer = here.plan.layers[name]
    layer.outs = _other(layer.outs, layer.size[1], here.pick)


@plan
def another_gamma_kept(here):
    name = here.layer("norm", where=_thinned(1))
    layer = here.plan.layers[name]
    layer.outs = layer.ins = _other(layer.outs, layer.size[1], here.pick)


@plan
def all_indices_one_too_low(here):
    _change(here, "outs", WRITERS, lambda kept: [max(i - 1, 0) for i in kept])


@plan
def inputs_swapped(here):
    _change(here, "ins", READERS, lambda kept: _swapped(kept, here.pick))


@plan
def filters_swapped(here):
    _change(here, "outs", WRITERS, lambda kept: _swapped(kept, here.pick))


@plan
def gammas_swapped(here):
    _change(here, "outs", ("norm",), lambda kept: _swapped(kept, here.pick))


@plan
def inputs_reversed(here):
    _change(here, "ins", READERS, lambda kept: kept[::-1])


@plan
def filters_reversed(here):
    _change(here, "outs", WRITERS, lambda kept: kept[::-1])


@plan
def an_input_doubled(here):
    _change(here, "ins", READERS, lambda kept: [kept[0], *kept[:-1]])


@plan
def an_input_forgotten(here):
    _change(here, "ins", READERS, lambda kept: kept[:-1])


@plan
def a_filter_forgotten(here):
    _change(here, "outs", WRITERS, lambda kept: kept[:-1])


@plan
def the_first_channels_kept(here):
    _change(here, "outs", WRITERS, lambda kept: list(range(len(kept))))


@plan
def select_reversed(here):
    _change(here, "select", ("norm",), lambda chosen: chosen[::-1])


@plan
def select_swapped(here):
    _change(here, "select", ("norm",), lambda chosen: _swapped(chosen, here.pick))


@plan
def select_off_by_one(here):
    _change(here, "select", ("norm",), lambda chosen: [max(i - 1, 0) for i in chosen])


@plan
def select_rolled(here):
    _change(here, "select", ("norm",), lambda chosen: chosen[1:] + chosen[:1])


@plan
def select_lost(here):
    here.plan.layers[here.layer("norm", where=lambda layer: layer.select is not None)].select = None


@plan
def scatter_shifted(here):
    name = here.layer("norm", where=lambda layer: layer.scatter is not None)
    layer = here.plan.layers[name]
    layer.scatter = [(i + 1) % layer.width for i in layer.scatter]


@plan
def scatter_swapped(here):
    _change(here, "scatter", ("norm",), lambda scatter: _swapped(scatter, here.pick))


@plan
def scatter_reversed(here):
    _change(here, "scatter", ("norm",), lambda scatter: scatter[::-1])


@plan
def scatter_lost(here):
    here.plan.layers[here.layer("norm", where=lambda layer: layer.scatter is not None)].place = None


@plan
def scatter_too_wide(here):
    here.plan.layers[here.layer("norm", where=lambda layer: layer.scatter is not None)].width += 1


@plan
def a_layer_forgotten(here):
    del here.plan.layers[here.layer(*WRITERS)]


@plan
def two_layers_exchanged(here):
    layers = here.plan.layers
    pairs = [(a, b) for a in layers for b in layers if a < b and layers[a].size == layers[b].size]
    pairs = [(a, b) for a, b in pairs if layers[a].kind == layers[b].kind != "norm" and layers[a] != layers[b]]
    a, b = here.choose(pairs)
    layers[a], layers[b] = layers[b], layers[a]


@plan
def a_tied_channel_kept_on_one_side_only(here):
    """A convolution and its BatchNorm keep another channel than those that share its component."""
    layers = list(here.plan.layers.items())
    pairs = [(c, n) for (_, c), (_, n) in itertools.pairwise(layers) if n.kind == "norm"]
    pairs = [(c, n) for c, n in pairs if c.kind in WRITERS and c.outs == n.outs and _thinned(1)(n)]
    convolution, norm = here.choose(pairs)
    norm.ins = norm.outs = convolution.outs = _other(norm.outs, norm.size[1], here.pick)


@plan
def a_group_position_off_by_one(here):
    layer = here.plan.layers[here.layer("grouped", where=_thinned(0))]
    layer.ins = _other(layer.ins, layer.size[0], here.pick, near=True)


@plan
def group_positions_reversed(here):
    _change(here, "ins", ("grouped",), lambda kept: kept[::-1])


@plan
def a_depthwise_pair_misaligned(here):
    _change(here, "outs", ("depthwise",), lambda kept: kept[1:] + kept[:1])


@plan
def depthwise_taken_for_dense(here):
    here.plan.layers[here.layer("depthwise")].kind = "conv"


@plan
def transposed_taken_for_plain(here):
    here.plan.layers[here.layer("transposed")].kind = "conv"


# --- the thin network -------------------------------------------------------------------------------------------------

ANY = ("conv", "linear", "transposed", "grouped", "depthwise")


def _weight(here, *kinds: str) -> torch.Tensor:
    return here.module(*(kinds or ANY)).weight.data


def _swap(tensor: torch.Tensor, pair: list[int], axis: int = 0) -> None:
    order = list(range(tensor.shape[axis]))
    order[pair[0]], order[pair[1]] = pair[1], pair[0]
    tensor.copy_(tensor.index_select(axis, torch.tensor(order)))


def _one(here, tensor: torch.Tensor) -> tuple:
    return tuple(here.pick.randrange(n) for n in tensor.shape)


@network
def two_filters_swapped(here):
    weight = _weight(here)
    _swap(weight, here.two(len(weight)))


@network
def two_inputs_swapped(here):
    weight = _weight(here, "conv", "linear", "grouped")
    _swap(weight, here.two(weight.shape[1]), axis=1)


@network
def a_kernel_transposed(here):
    weight = here.module("conv", "depthwise", "grouped", where=lambda m: m.weight.shape[-1] > 1).weight.data
    weight.copy_(weight.clone().transpose(2, 3))


@network
def one_weight_off_by_a_millionth(here):
    weight = _weight(here)
    weight[_one(here, weight)] += 1e-6 * weight.abs().mean()


@network
def one_weight_off_by_a_thousandth(here):
    weight = _weight(here)
    weight[_one(here, weight)] += 1e-3 * weight.abs().mean()


@network
def one_weight_zero(here):
    weight = _weight(here)
    weight[_one(here, weight)] = 0


@network
def weights_in_single_precision(here):
    weight = _weight(here)
    weight.copy_(weight.float().double())


@network
def nan_in_one_weight(here):
    weight = _weight(here)
    weight[_one(here, weight)] = float("nan")


@network
def infinity_in_one_weight(here):
    weight = _weight(here)
    weight[_one(here, weight)] = float("inf")


@network
def nan_in_one_gamma(here):
    weight = _weight(here, "norm")
    weight[_one(here, weight)] = float("nan")


@network
def nan_in_a_running_mean(here):
    mean = here.module("norm").running_mean
    mean[_one(here, mean)] = float("nan")


@network
def a_bias_dropped(here):
    here.module(*ANY, where=lambda m: m.bias is not None).bias = None


@network
def a_bias_rolled(here):
    bias = here.module(*ANY, where=lambda m: m.bias is not None and len(m.bias) > 1).bias.data
    bias.copy_(bias.roll(1))


@network
def beta_dropped(here):
    here.module("norm").bias.data.zero_()


@network
def two_betas_swapped(here):
    bias = here.module("norm").bias.data
    _swap(bias, here.two(len(bias)))


@network
def one_gamma_of_the_other_sign(here):
    gamma = _weight(here, "norm")
    gamma[_one(here, gamma)] *= -1


@network
def gammas_reset(here):
    here.module("norm").weight.data.fill_(1)


def _unsliced(here, key: str) -> None:
    """Put the first values of the dense network's tensor where the kept ones belong."""
    name = here.layer("norm", where=_thinned(1))
    thin, dense = here.thin.get_submodule(name), here.model.get_submodule(name)
    getattr(thin, key).data.copy_(getattr(dense, key).data[: thin.num_features])


@network
def running_mean_not_sliced(here):
    _unsliced(here, "running_mean")


@network
def running_variance_not_sliced(here):
    _unsliced(here, "running_var")


@network
def gamma_not_sliced(here):
    _unsliced(here, "weight")


@network
def running_statistics_of_the_wrong_size(here):
    name = here.layer("norm", where=_thinned(1))
    here.thin.get_submodule(name).running_mean = here.model.get_submodule(name).running_mean.clone()


@network
def running_statistics_reset(here):
    here.module("norm").reset_running_stats()


@network
def running_statistics_dropped(here):
    module = here.module("norm")
    module.running_mean = module.running_var = None


@network
def two_running_means_swapped(here):
    mean = here.module("norm").running_mean
    _swap(mean, here.two(len(mean)))


@network
def mean_and_variance_exchanged(here):
    module = here.module("norm")
    module.running_mean, module.running_var = module.running_var.clone(), module.running_mean.abs()


@network
def another_epsilon(here):
    here.module("norm").eps *= 100


@network
def a_batchnorm_skipped(here):
    here.module("norm").forward = lambda x: x


@network
def the_indices_of_a_selection_forgotten(here):
    module = here.module("norm", where=lambda m: isinstance(m, SelectBatchNorm))
    module.select = module.scatter = None


@network
def a_selection_before_normalising_twice(here):
    module = here.module("norm", where=lambda m: isinstance(m, SelectBatchNorm) and m.select is not None)
    module.select = module.select[module.select.clamp_max(len(module.select) - 1)]


@network
def zeros_that_are_not_zero(here):
    module = here.module("norm", where=lambda m: isinstance(m, SelectBatchNorm) and m.scatter is not None)
    forward, empty = module.forward, sorted(set(range(module.width)) - set(module.scatter.tolist()))
    if not empty:
        raise NotHere
    module.forward = lambda x: forward(x).index_fill(1, torch.tensor(empty), 1e-3)


@network
def groups_rolled(here):
    module = here.module("grouped")
    module.weight.data.copy_(module.weight.data.roll(len(module.weight) // module.groups, 0))


@network
def groups_of_before(here):
    name = here.layer("depthwise", where=_thinned(1))
    here.thin.get_submodule(name).groups = here.model.get_submodule(name).groups


@network
def one_group_for_all(here):
    here.module("grouped").groups = 1


@network
def a_depthwise_filter_of_its_neighbour(here):
    weight = _weight(here, "depthwise")
    weight.copy_(weight.roll(1, 0))


@network
def a_stale_num_features(here):
    name = here.layer("norm", where=_thinned(1))
    here.thin.get_submodule(name).num_features = here.model.get_submodule(name).num_features


@network
def stale_channel_counts(here):
    name = here.layer("conv", where=_thinned(1))
    thin, dense = here.thin.get_submodule(name), here.model.get_submodule(name)
    thin.in_channels, thin.out_channels = dense.in_channels, dense.out_channels


@network
def a_head_that_is_shared_no_more(here):
    """Each use of a layer that was used twice gets weights of its own, equal ones: nothing changes."""
    module = here.module(*ANY)
    module.weight = nn.Parameter(module.weight.detach().clone())


@network
def left_in_train_mode(here):
    here.thin.train()


# --- the code of the surgery ------------------------------------------------------------------------------------------


@code
def slices_sorted_downwards(here):
    take = surgery._take
    return {"_take": lambda tensor, axes: take(tensor, [(axis, i.flip(0)) for axis, i in axes if axis == 0])}


@code
def inputs_not_sliced(here):
    take = surgery._take
    return {"_take": lambda tensor, axes: take(tensor, [(axis, i) for axis, i in axes if axis == 0])}


@code
def every_index_one_too_high(here):
    take = surgery._take
    return {"_take": lambda tensor, axes: take(tensor, [(a, (i + 1) % tensor.shape[a]) for a, i in axes])}


@code
def the_first_ones_taken(here):
    take = surgery._take
    return {"_take": lambda tensor, axes: take(tensor, [(a, torch.arange(len(i))) for a, i in axes])}


@code
def axes_exchanged(here):
    axes = surgery.axes_of
    return {"axes_of": lambda layer, t: axes(dataclasses.replace(layer, ins=layer.outs, outs=layer.ins), t)}


@code
def biases_sliced_by_inputs(here):
    axes = surgery.axes_of
    if not any(p.ins != p.outs for p in here.plan.layers.values() if p.kind in ANY):
        raise NotHere
    return {"axes_of": lambda layer, t: [(0, layer.ins)] if t.ndim == 1 else axes(layer, t)}


def _keys_left_out(*left_out: str) -> dict:
    tensors = surgery.tensors_of
    return {"tensors_of": lambda *args: [(k, t) for k, t in tensors(*args) if k not in left_out]}


@code
def running_statistics_never_sliced(here):
    return _keys_left_out("running_mean", "running_var")


@code
def biases_never_sliced(here):
    return _keys_left_out("bias")


@code
def selections_never_made(here):
    if not here.layers("norm", where=lambda layer: layer.select is not None or layer.scatter is not None):
        raise NotHere
    fit = surgery.fit_attributes
    return {"fit_attributes": lambda m, n, p: fit(m, n, dataclasses.replace(p, select=None, scatter=None))}


@code
def attributes_never_fitted(here):
    if not here.layers("depthwise"):
        raise NotHere
    return {"fit_attributes": lambda model, name, layer: None}


def _mask_without(key: str) -> dict:
    """A specification that leaves gamma or beta of the pruned channels as they were."""
    mask = proof.mask

    def masked(model, plan):
        result = mask(model, plan)
        for name in plan.keep:
            getattr(result.get_submodule(name), key).data.copy_(getattr(model.get_submodule(name), key).data)
        return result

    return {"mask": masked}


@mask
def a_mask_that_forgets_beta(here):
    return _mask_without("bias")


@mask
def a_mask_that_forgets_gamma(here):
    return _mask_without("weight")


@mask
def a_mask_that_forgets_a_filter(here):
    del here.plan.zeroed[here.choose([*here.plan.zeroed])]


@mask
def a_mask_that_forgets_one_channel_of_a_filter(here):
    name = here.choose([*here.plan.zeroed])
    channels = here.plan.zeroed[name]
    channels.remove(here.pick.choice(channels))


@mask
def a_mask_that_zeroes_another_filter(here):
    name = here.choose([*here.plan.zeroed])
    here.plan.zeroed[name] = _other(here.plan.zeroed[name], here.plan.layers[name].size[1], here.pick)


@mask
def a_mask_that_forgets_the_biases_of_filters(here):
    mask, layers = proof.mask, [n for n in here.plan.zeroed if here.model.get_submodule(n).bias is not None]
    if not layers:
        raise NotHere

    def masked(model, plan):
        result = mask(model, plan)
        for name in layers:
            result.get_submodule(name).bias.data.copy_(model.get_submodule(name).bias.data)
        return result

    return {"mask": masked}
