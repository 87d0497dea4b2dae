"""Splitting convolutions and linear layers into factors of low rank, all by one threshold on energy.

A linear layer or a 1x1 convolution becomes two (SVD). A larger convolution becomes 1x1, k x k, 1x1 (Tucker-2: Kim et al.,
arXiv:1511.06530), or k x 1, 1 x k (Jaderberg et al., arXiv:1405.3866), whichever is cheaper. All bases are the leading
eigenvectors of a Gram matrix of the weights, so that full rank changes nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slimming.channels.copying import copy_model, shallow_copy
from slimming.channels.inputs import call_model
from slimming.errors import ConfigError, GraphError, PlanError, check_number

KINDS = {"svd": 1, "spatial": 1, "tucker": 2}  # how many ranks a split has
Split = dict[str, Any]  # {"kind": one of KINDS, "ranks": [whole numbers]}, plain data
Layer = nn.Conv2d | nn.Linear
HALVINGS = 60  # of the interval in which the threshold is searched


class LowRank(nn.Sequential):
    """The factors of one layer, in the order in which they run."""


class Splitting(NamedTuple):
    """A copy with layers split, the splits by layer, and the share of the MACs of what can be split that remains."""

    model: nn.Module
    splits: dict[str, Split]
    share: float


@dataclass
class _Layer:
    """A layer that may be split.

    Attributes:
        module: the convolution or linear layer.
        positions: how often its weights are applied at (input, output, output rows by input columns) positions.
        energy: by kind, for each of its ranks the (n,) cumulative share of energy that the leading ones hold.
    """

    module: Layer
    positions: tuple[int, int, int]
    energy: dict[str, list[Tensor]]

    @property
    def macs(self) -> int:
        return self.module.weight.numel() * self.positions[1]

    def cheapest(self, threshold: float) -> tuple[int, Split | None]:
        """Return the MACs and the split that loses at most 1 - threshold of the energy; None where whole is cheapest."""
        best: tuple[int, Split | None] = self.macs, None
        if threshold >= 1:
            return best
        for kind, energies in self.energy.items():
            keep = 1 - (1 - threshold) / len(energies)  # the losses of several bases add up at most
            ranks = [min(len(e), int((e < keep - 1e-12).sum()) + 1) for e in energies]
            macs = self.cost(kind, ranks)
            if macs < best[0]:
                best = macs, {"kind": kind, "ranks": ranks}
        return best

    def cost(self, kind: str, ranks: list[int]) -> int:
        outs, ins = self.module.weight.shape[:2]
        before, after, between = self.positions
        if kind == "svd":
            return after * ranks[0] * (ins + outs)
        height, width = self.module.weight.shape[2:]
        if kind == "spatial":
            return ranks[0] * (between * ins * height + after * width * outs)
        first, second = ranks
        return before * ins * first + after * (first * second * height * width + second * outs)


def low_rank(model: nn.Module, example: Any, share: float) -> Splitting:
    """Split the layers of a copy so that at most `share` of the MACs of those that can be split remains.

    One threshold on the energy (squared weights) that every split keeps is lowered until the target is met. A layer that
    gets no cheaper stays whole, as do grouped ones, those whose weights others share, and those of other classes.

    Args:
        example: an input; MACs are counted on it.
        share: in (0, 1]; 1 changes nothing.

    Raises:
        ConfigError: a share out of range, or less than rank 1 leaves.
        GraphError: the network does not run, whole or split.
    """
    check_number("low_rank", share, 0, 1, above=True)
    layers = _find_layers(model, example)
    whole = sum(layer.macs for layer in layers.values())
    threshold = _search(lambda t: sum(la.cheapest(t)[0] for la in layers.values()), share * whole, whole)
    found = {name: layer.cheapest(threshold)[1] for name, layer in layers.items()}
    splits = {name: split for name, split in found.items() if split is not None}
    remaining = sum(layer.cheapest(threshold)[0] for layer in layers.values())
    result = low_rank_like(model, splits)
    with torch.no_grad():
        for name in splits:
            _factorise(model.get_submodule(name), result.get_submodule(name), splits[name])
    _run(result.eval(), example, "split into factors, the network")
    result.train(model.training)
    return Splitting(result, splits, remaining / whole if whole else 1.0)


def _search(cost: Callable[[float], int], target: float, whole: int) -> float:
    """Return the highest threshold in [0, 1] that meets a target; costs grow with the threshold."""
    if cost(1.0) <= target:
        return 1.0
    if cost(0.0) > target:
        raise ConfigError(
            f"low_rank: with rank 1 everywhere {cost(0.0) / whole:.4f} of the MACs remain: give more than that"
        )
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= target else (low, middle)
    return low


# --- which layers -------------------------------------------------------------------------------------------------------


def _is_splittable(module: nn.Module) -> bool:
    if type(module) is nn.Conv2d:
        return module.groups == 1
    return type(module) is nn.Linear


def _names(model: nn.Module) -> dict[str, Layer]:
    """Return the layers of a splittable class, by name, that no two places of the network share."""
    everywhere = list(model.named_modules(remove_duplicate=False))
    times: dict[int, int] = {}
    for _, module in everywhere:
        for parameter in module.parameters(recurse=False):
            times[id(parameter)] = times.get(id(parameter), 0) + 1
    return {
        name: module
        for name, module in everywhere
        if isinstance(module, nn.Conv2d | nn.Linear)
        and _is_splittable(module)
        and all(times[id(p)] == 1 for p in module.parameters(recurse=False))
        and len([*module.parameters()]) == len([*module.parameters(recurse=False)])
    }


def _find_layers(model: nn.Module, example: Any) -> dict[str, _Layer]:
    """Run the network and return the layers that ran, with what they cost and the energies of their bases."""
    copied = shallow_copy(model).eval()
    seen: dict[str, tuple[int, int, int]] = {}

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def note(module: nn.Module, args: Any, out: Tensor) -> None:
            x = args[0] if args else out
            now = _positions(module, x, out)
            seen[name] = tuple(a + b for a, b in zip(seen.get(name, (0, 0, 0)), now, strict=True))  # type: ignore[assignment]

        return note

    names = _names(copied)
    for name, module in names.items():
        module.register_forward_hook(watch(name))
    _run(copied, example, "the network")
    return {name: _Layer(names[name], p, _energies(names[name])) for name, p in seen.items() if min(p) > 0}


def _positions(module: nn.Module, x: Tensor, out: Tensor) -> tuple[int, int, int]:
    if isinstance(module, nn.Linear):
        rows = out[..., 0].numel()
        return rows, rows, rows
    batch = 1 if out.ndim == 3 else out.shape[0]
    height, width = out.shape[-2:]
    return batch * x.shape[-2] * x.shape[-1], batch * height * width, batch * height * x.shape[-1]


def _run(model: nn.Module, example: Any, what: str) -> None:
    try:
        with torch.no_grad():
            call_model(model, example)
    except Exception as error:
        raise GraphError(f"low_rank: {what} fails on the example input: {type(error).__name__}: {error}") from error


# --- bases --------------------------------------------------------------------------------------------------------------


def _kinds(module: Layer) -> list[str]:
    if isinstance(module, nn.Linear) or module.weight.shape[2:].numel() == 1:
        return ["svd"]
    return ["tucker", "spatial"] if min(module.weight.shape[2:]) > 1 and module.padding_mode == "zeros" else ["tucker"]


def _is_wide(weight: Tensor) -> bool:
    """Return whether the matrix (out * kw, in * kh) of a layer has no more rows than columns."""
    width, height = (1, 1) if weight.ndim == 2 else (weight.shape[3], weight.shape[2])
    return weight.shape[0] * width <= weight.shape[1] * height


def _matrices(weight: Tensor, kind: str) -> list[Tensor]:
    """Return for each rank of a split the matrix of which the leading left singular vectors are a basis."""
    wide = weight.detach().double()
    if kind == "tucker":
        return [wide.transpose(0, 1).flatten(1), wide.flatten(1)]  # (in, ...), (out, ...)
    if wide.ndim == 4:
        wide = wide.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)  # (out * kw, in * kh)
    return [wide if _is_wide(weight) else wide.T]


def _basis(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return (rows, rows) the left singular vectors of a matrix, strongest first, and the squares of its singular values."""
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    return vectors.flip(1), values.flip(0).clamp(min=0)


def _energies(module: Layer) -> dict[str, list[Tensor]]:
    found = {}
    for kind in _kinds(module):
        values = [_basis(matrix)[1].cpu() for matrix in _matrices(module.weight, kind)]
        found[kind] = [v.cumsum(0) / v.sum().clamp(min=torch.finfo(v.dtype).tiny) for v in values]
    return found


def _factorise(module: nn.Module, factors: nn.Module, split: Split) -> None:
    """Fill the factors of a layer."""
    assert isinstance(module, nn.Conv2d | nn.Linear) and isinstance(factors, LowRank)
    matrices = _matrices(module.weight, split["kind"])
    bases = [_basis(matrix)[0][:, :rank] for matrix, rank in zip(matrices, split["ranks"], strict=True)]
    new = _tucker(module.weight, *bases) if split["kind"] == "tucker" else _pair(module.weight, matrices[0], bases[0])
    for factor, value in zip(factors, new, strict=True):
        assert isinstance(factor.weight, Tensor)
        factor.weight.copy_(value.reshape(factor.weight.shape))
    if module.bias is not None:
        last = factors[-1].bias
        assert isinstance(last, Tensor)
        last.copy_(module.bias)


def _tucker(weight: Tensor, ins: Tensor, outs: Tensor) -> list[Tensor]:
    """Return the weights of 1x1, k x k and 1x1 from bases (C_in, r), (C_out, s)."""
    core = torch.einsum("oihw,ir,os->srhw", weight.detach().double(), ins, outs)
    return [ins.T, core, outs]


def _pair(weight: Tensor, matrix: Tensor, basis: Tensor) -> list[Tensor]:
    """Return the weights of two layers whose product is nearest to a matrix, of which `basis` is one side."""
    other = basis.T @ matrix  # (r, columns)
    left, right = (basis, other) if _is_wide(weight) else (other.T, basis.T)  # (out * kw, r), (r, in * kh)
    width, height = (1, 1) if weight.ndim == 2 else (weight.shape[3], weight.shape[2])
    right = right.view(-1, weight.shape[1], height)
    return [right, left.reshape(weight.shape[0], width, -1).transpose(1, 2)]  # (r, in, kh), (out, r, kw)


# --- the architecture ---------------------------------------------------------------------------------------------------


def low_rank_like(model: nn.Module, splits: Mapping[str, Split]) -> nn.Module:
    """Return a copy with the factors that `splits` describes; their weights are whatever torch draws.

    Raises:
        PlanError: a layer that this network does not have or that is not split, or ranks that it cannot have.
    """
    result, known = copy_model(model), _names(model)
    for name, split in splits.items():
        if name not in known:
            raise PlanError(f"low_rank: this network has no convolution or linear layer {name} that can be split")
        _check(name, known[name], split)
        parent, _, attribute = name.rpartition(".")
        factors = _factors(known[name], split["kind"], split["ranks"]).train(known[name].training)
        setattr(result.get_submodule(parent), attribute, factors)
    return result


def _check(name: str, module: Layer, split: Any) -> None:
    """Raise PlanError unless a split is one of this layer."""
    kind = split.get("kind") if isinstance(split, Mapping) else None
    if kind not in _kinds(module):
        raise PlanError(f"low_rank: {name} is split by one of {', '.join(_kinds(module))}, not {str(kind)[:50]}")
    ranks = split.get("ranks")
    limits = [matrix.shape[0] for matrix in _matrices(module.weight, kind)]
    good = isinstance(ranks, list) and len(ranks) == KINDS[kind]
    if not good or not all(type(r) is int and 1 <= r <= n for r, n in zip(ranks, limits, strict=True)):
        raise PlanError(f"low_rank: ranks of {name} must be whole numbers from 1 to {limits}, got {str(ranks)[:50]}")


def _factors(module: Layer, kind: str, ranks: list[int]) -> LowRank:
    bias = module.bias is not None
    where: dict[str, Any] = {"device": module.weight.device, "dtype": module.weight.dtype}
    if isinstance(module, nn.Linear):
        first = nn.Linear(module.in_features, ranks[0], bias=False, **where)
        return LowRank(first, nn.Linear(ranks[0], module.out_features, bias=bias, **where))
    ins, outs = module.in_channels, module.out_channels
    if kind == "spatial":
        down, along = (_one_axis(module, axis) for axis in (0, 1))
        rows = nn.Conv2d(ins, ranks[0], bias=False, **down, **where)
        return LowRank(rows, nn.Conv2d(ranks[0], outs, bias=bias, **along, **where))
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    settings: dict[str, Any] = {name: getattr(module, name) for name in names} | where
    if kind == "svd":
        return LowRank(
            nn.Conv2d(ins, ranks[0], bias=False, **settings), nn.Conv2d(ranks[0], outs, 1, bias=bias, **where)
        )
    core = nn.Conv2d(ranks[0], ranks[1], bias=False, **settings)
    before, after = nn.Conv2d(ins, ranks[0], 1, bias=False, **where), nn.Conv2d(ranks[1], outs, 1, bias=bias, **where)
    return LowRank(before, core, after)


def _one_axis(module: nn.Conv2d, axis: int) -> dict[str, Any]:
    """Return the settings of a convolution along one spatial axis alone."""
    neutral = {"kernel_size": 1, "stride": 1, "dilation": 1, "padding": 0}
    found: dict[str, Any] = {}
    for name, other in neutral.items():
        value: Any = getattr(module, name)
        pair = (value[axis], other) if axis == 0 else (other, value[axis])
        found[name] = value if isinstance(value, str) else pair
    return found
