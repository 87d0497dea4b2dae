"""The channel graph of a network: what is tied to what, and what must stay when some gammas go.

`trace` (trace.py) makes one of what it watches. `ChannelGraph.plan` lets a criterion choose gammas, then finds everything that
can go with them:

1. zero: atoms whose writers are all pruned BatchNorm channels carry zero, and their readers can drop them;
2. live: backwards to a fixed point, an atom lives if a live reader needs it;
3. everything that does not live goes; channels come back until no layer has an empty side.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from slimming.channels import explain
from slimming.channels.criteria import Budget, Choice, Criterion
from slimming.channels.options import PlanOptions
from slimming.channels.penalty import other_norms
from slimming.channels.plan import LayerPlan, PruningPlan, describe_network, fingerprint
from slimming.channels.sizes import new_values
from slimming.channels.tape import CARRYING, FROZEN, Tape, Use
from slimming.errors import GraphError, PlanError, check_patterns
from slimming.options import check_options

CHOOSING = (
    "topk",
    "sort",
    "argsort",
    "argmax",
    "max",
    "nms",
    "torchvision::nms",
    "nonzero",
    "where",
    "_local_scalar_dense",
)


@dataclass
class Norm:
    """A BatchNorm with scales: its place among all gammas."""

    name: str
    module: nn.modules.batchnorm._BatchNorm
    start: int
    use: Use
    trainable: bool

    @property
    def all(self) -> slice:
        return slice(self.start, self.start + self.module.num_features)


@dataclass
class Solution:
    """What stays: `live` per class of atoms, `kept` per gamma (chosen and needed)."""

    live: Tensor
    kept: Tensor


class ChannelGraph:
    """Atoms, ties and layers of a network; see the module's docstring.

    Attributes:
        model: the network.
        unknown: what was frozen because it is not understood, with the reason.
        candidates: by `ties`, which gammas may be chosen.
    """

    def __init__(self, model: nn.Module, tape: Tape, evaluated: tuple[int, int], spec: Any, train_reason: str):
        self.model, self.tape, self.evaluated, self.spec, self.train_reason = model, tape, evaluated, spec, train_reason
        self.modules = dict(model.named_modules())
        self.component = _components(tape.count, tape.ties)
        self.frozen = torch.zeros(tape.count, dtype=torch.bool)
        self.frozen[self.component[FROZEN]] = True
        for atoms, _ in tape.frozen:
            self.frozen[self.component[atoms]] = True
        for use in tape.uses:
            if use.name in tape.fixed:
                for side in (use.read, use.write, use.source, use.target):
                    self.frozen[self.component[side]] = True
        reasons = dict.fromkeys(reason for _, reason in tape.frozen if reason != "network output")
        self.unknown = [*reasons, *(f"batch_norm in {name}: {reason}" for name, reason in tape.fixed.items())]
        self.layers: dict[str, Use] = {}
        for use in tape.uses:
            self.layers.setdefault(use.name, use)
        self.norms = self._find_norms()
        self.count = sum(n.module.num_features for n in self.norms.values())
        self._reads = [self.component[use.read] for use in tape.uses]
        self._writes = [self.component[use.write] for use in tape.uses]

    def anew(self) -> "ChannelGraph":
        """Return the graph of the tape as it is now."""
        return ChannelGraph(self.model, self.tape, self.evaluated, self.spec, self.train_reason)

    def _find_norms(self) -> dict[str, Norm]:
        norms, start = {}, 0
        for name, use in self.layers.items():
            module = self.modules[name] if use.kind == "norm" else None
            if module is not None and module.weight is not None and module.bias is not None:
                trainable = module.weight.requires_grad and name not in self.tape.fixed
                norms[name] = Norm(name, module, start, use, trainable)
                start += module.num_features
        return norms

    # --- what goes ----------------------------------------------------------------------------------------------------

    def zero_atoms(self, kept: Tensor) -> Tensor:
        """Return which atoms carry zero when the gammas outside `kept` (all gammas,) bool are pruned."""
        zero = torch.zeros(self.tape.count, dtype=torch.bool)
        for event in self.tape.zeros:
            if event.when == "always":
                zero[event.out] = True
            elif event.when == "gamma":
                zero[event.out] = ~kept[self.norms[event.layer].all]
            else:
                rows = zero[event.operands]
                zero[event.out] = rows.all(0) if event.when == "all" else rows.any(0)
        return zero

    def solve(self, kept: Tensor, forced: Tensor) -> Solution:
        """Find what lives when the gammas outside `kept` are pruned; `forced` (atoms,) bool classes live in any case."""
        zero = self.zero_atoms(kept)
        live = self.frozen | forced
        for product in self.tape.products:
            if product.sums:
                live[self.component[product.atoms[~zero[product.atoms]]]] = True
        before = -1
        while before != (before := int(live.sum())):
            for use, reads, writes in zip(
                reversed(self.tape.uses), reversed(self._reads), reversed(self._writes), strict=True
            ):
                if use.kind == "norm":
                    norm = self.norms.get(use.name)
                    needed = live[writes] if norm is None else live[writes] & kept[norm.all]
                    live[reads[needed]] = True
                elif use.kind in CARRYING or not bool(live[writes].any()):
                    continue
                else:
                    live[reads[~zero[use.read]]] = True
        final = kept.clone()
        for norm in self.norms.values():
            final[norm.all] &= live[self.component[norm.use.write]]
        return Solution(live, final)

    # --- decisions ----------------------------------------------------------------------------------------------------

    def candidates(self, ties: str, ignore: Iterable[str] = ()) -> Tensor:
        """Return which gammas may be chosen, (all gammas,) bool.

        Apart: every trainable one. Together: those of a class that dies with them: not frozen, read by no BatchNorm but one
        that is decided with it, and zero wherever a convolution or linear layer reads it once all its gammas are pruned.

        Raises:
            ConfigError: a pattern to ignore that matches no BatchNorm.
        """
        norms = (n for n, m in self.modules.items() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        check_patterns("ignore", ignore, norms, "BatchNorm")
        trainable = torch.zeros(self.count, dtype=torch.bool)
        for norm in self.norms.values():
            trainable[norm.all] = norm.trainable and not any(fnmatchcase(norm.name, p) for p in ignore)
        return trainable if ties == "apart" else self._together(trainable)[0]

    def _together(self, trainable: Tensor) -> tuple[Tensor, Tensor]:
        """Return which of the trainable gammas may be decided together, and the class of every gamma; (all gammas,) each."""
        pairs, slots = self._pairs(trainable), self.slots()
        free = self._free_classes(trainable, pairs)
        joined = _components(self.tape.count, [pairs[:, free[pairs[0]]]])
        return trainable & free[slots], joined[slots]

    def _free_classes(self, trainable: Tensor, pairs: Tensor) -> Tensor:
        """Return which classes die with the trainable gammas that write them, (atoms,) bool.

        Args:
            pairs: (2, n) classes that one BatchNorm reads and writes, decided as one: the first is free only if the second is.
        """
        zero = self.zero_atoms(~trainable)
        blocked = self.frozen.clone()
        paired = torch.zeros_like(blocked)
        paired[pairs[0]] = True
        for use, reads in zip(self.tape.uses, self._reads, strict=True):
            if use.kind == "norm":
                blocked[reads[~paired[reads]]] = True
            elif use.kind not in CARRYING:
                blocked[reads[~zero[use.read]]] = True
        for product in self.tape.products:
            if product.sums:
                blocked[self.component[product.atoms[~zero[product.atoms]]]] = True
        for norm in self.norms.values():
            blocked[self.component[norm.use.write][~trainable[norm.all]]] = True
        count = -1
        while count != (count := int(blocked.sum())):
            blocked[pairs[0][blocked[pairs[1]]]] = True
        return ~blocked

    def _pairs(self, trainable: Tensor) -> Tensor:
        """Return (2, n) classes that BatchNorms read and write, where all that read the one write the other.

        They are decided as one: a depthwise convolution's BatchNorm and the one before it, the branches of re-parameterised
        blocks. A stream whose readers write elsewhere (dense and pre-activation networks) is not: they select.
        """
        lowest = torch.full((self.tape.count,), self.tape.count)
        highest = torch.full((self.tape.count,), -1)
        for use, reads, writes in zip(self.tape.uses, self._reads, self._writes, strict=True):
            if use.kind == "norm":
                norm = self.norms.get(use.name)
                good = trainable[norm.all] if norm is not None else torch.zeros(len(reads), dtype=torch.bool)
                lowest.scatter_reduce_(0, reads, torch.where(good, writes, -1), "amin")
                highest.scatter_reduce_(0, reads, writes, "amax")
        read = (lowest == highest).nonzero().flatten()
        return torch.stack((read, highest[read]))

    def slots(self) -> Tensor:
        """Return the class of every gamma's slot, (all gammas,)."""
        found = [self.component[n.use.write] for n in self.norms.values()]
        return torch.cat(found) if found else torch.empty(0, dtype=torch.long)

    def scores(self, score: str, seed: int = 0) -> Tensor:
        """Return a score per gamma, (all gammas,) float64: |gamma|, `random`, or `weight_l1` of the filter it scales.

        Raises:
            GraphError: a gamma is not finite.
        """
        for norm in self.norms.values():
            if not bool(norm.module.weight.isfinite().all()):
                raise GraphError(
                    f"the scales of {norm.name} are not finite: take a checkpoint from before that happened"
                )
        if score == "random":
            return torch.rand(self.count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        if score == "gamma":
            return torch.cat([n.module.weight.detach().abs().double().cpu() for n in self.norms.values()])
        mass = torch.zeros(self.tape.count, dtype=torch.float64)  # L1 of all filters that write a class
        for name, use in self.layers.items():
            if use.kind in ("conv", "linear", "grouped", "transposed"):
                weight = _weight(self.model, self.modules, name).detach().abs().double().cpu()
                axis = 1 if use.kind == "transposed" else 0
                mass.index_add_(0, self.component[use.write], weight.sum([i for i in range(weight.ndim) if i != axis]))
        return torch.cat([mass[self.component[n.use.read]] for n in self.norms.values()])

    def plan(self, criterion: Criterion, *, seed: int = 0, **options: Any) -> PruningPlan:
        """Let a criterion choose, find all that goes with it, and bring back what the constraints want.

        Args:
            criterion: of slimming.channels.criteria.
            seed: of score="random".
            options: fields of PlanOptions, which says what they mean and allow.

        Raises:
            GraphError: nothing can be pruned, or a gamma is not finite.
            ConfigError: a value out of range, or a pattern to ignore that matches no BatchNorm.
        """
        chosen = PlanOptions(**options)
        check_options(chosen)
        self._check_prunable()
        free, classes = self.candidates("apart", list(chosen.ignore)), torch.arange(self.count)
        if chosen.ties == "together":
            free, classes = self._together(free)
        if not bool(free.any()):
            raise GraphError("no BatchNorm scale can go: " + self._why_not())
        values = self.scores(chosen.score, seed)
        choice = self._choice(free, classes, values, chosen.reduce)

        def outcome(removed: Tensor) -> Solution:
            kept = torch.ones(self.count, dtype=torch.bool)
            kept[choice.gammas] = ~removed[choice.unit]
            return self._settle(kept, values, choice, chosen)

        if isinstance(criterion, Budget):
            removed = criterion.search(choice, lambda removed: self.cost_share(outcome(removed)))
        else:
            removed = criterion.choose(choice)
        return self._write_plan(outcome(removed), choice, removed, criterion)

    def _choice(self, free: Tensor, classes: Tensor, values: Tensor, reduce: str) -> Choice:
        gammas = free.nonzero().flatten()
        _, unit = classes[gammas].unique(return_inverse=True)
        # Units are numbered by their first gamma, so that equal scores keep the order of the layers.
        first = torch.full((int(unit.max()) + 1,), len(unit)).scatter_reduce(0, unit, torch.arange(len(unit)), "amin")
        unit = first.argsort().argsort()[unit]
        own = values[gammas]
        score = torch.zeros(len(first), dtype=torch.float64).scatter_reduce(
            0, unit, own, "amax" if reduce == "max" else "mean", include_self=False
        )
        layer = torch.cat([torch.full((n.module.num_features,), i) for i, n in enumerate(self.norms.values())])
        return Choice(gammas, unit, score, unit.bincount(), layer[gammas])

    def _settle(self, kept: Tensor, values: Tensor, choice: Choice, options: PlanOptions) -> Solution:
        """Bring back the strongest until every norm keeps what the constraints want and no layer has an empty side."""
        unit_of = torch.full((self.count,), -1)
        unit_of[choice.gammas] = choice.unit
        forced = torch.zeros(self.tape.count, dtype=torch.bool)
        strength = self._strength(values)
        while True:
            solution = self.solve(kept, forced)
            short = False
            for norm in self.norms.values():
                have = solution.kept[norm.all]
                missing = _wanted(len(have), int(have.sum()), options) - int(have.sum())
                if missing > 0:
                    short = True
                    back = torch.where(have, -1.0, values[norm.all]).topk(missing).indices
                    gammas = norm.start + back
                    units = unit_of[gammas]
                    kept[gammas] = True
                    kept[choice.gammas[torch.isin(choice.unit, units[units >= 0])]] = True
                    forced[self.component[norm.use.write[back]]] = True
            if short:
                continue
            for use, reads, writes in zip(self.tape.uses, self._reads, self._writes, strict=True):
                for side in (reads, writes):
                    if use.kind != "norm" and not bool(solution.live[side].any()):
                        forced[side[strength[side].argmax()]] = True
                        short = True
            if not short:
                return solution

    def _strength(self, values: Tensor) -> Tensor:
        """Return the largest score of a gamma that writes or reads a class, (atoms,)."""
        strength = torch.zeros(self.tape.count, dtype=torch.float64)
        for norm in self.norms.values():
            for side in (norm.use.write, norm.use.read):
                strength.scatter_reduce_(0, self.component[side], values[norm.all], "amax")
        return strength

    # --- what it costs ------------------------------------------------------------------------------------------------

    def cost_share(self, solution: Solution) -> dict[str, float]:
        """Return {macs, params}: what remains, as shares of the dense network's."""
        thin = self._cost(solution.live, solution.kept)
        return {k: thin[k] / max(1, self.dense_cost[k]) for k in thin}

    @functools.cached_property
    def dense_cost(self) -> dict[str, int]:
        """{macs, params} of the network as it is; macs of the whole example."""
        return self._cost(None, None)

    def _cost(self, live: Tensor | None, kept: Tensor | None) -> dict[str, int]:
        """Count {macs, params} of what lives; None: of everything."""

        def count(mask: Tensor | None, which: Tensor | slice, size: int) -> int:
            return size if mask is None else int(torch.count_nonzero(mask[which]))

        macs, params, seen = self.tape.other_macs, 0, set()
        for i, (use, reads, writes) in enumerate(zip(self.tape.uses, self._reads, self._writes, strict=True)):
            if use.kind == "norm":
                norm = self.norms.get(use.name)
                weights = 0 if norm is None else 2 * count(kept, norm.all, len(writes))
            else:
                ins = 1 if use.kind in CARRYING else count(live, reads, len(reads))
                outs = count(live, writes, len(writes))
                weights = ins * outs // (use.groups if use.kind == "grouped" else 1) * use.kernel
                macs += use.positions * weights * (i < self.evaluated[0])
                weights += outs * use.bias
            params += weights * (use.name not in seen)
            seen.add(use.name)
        for product in self.tape.products[: self.evaluated[1]]:
            macs += product.macs * count(live, self.component[product.atoms], len(product.atoms))
        return {"macs": macs, "params": params + self._other_params}

    @functools.cached_property
    def _other_params(self) -> int:
        """Count parameters of layers that no rule resizes."""
        total = sum(p.numel() for p in self.model.parameters())
        own = {id(p): p for name in self.layers for p in _parameters(self.model, self.modules, name)}
        return total - sum(p.numel() for p in own.values())

    # --- writing it down ----------------------------------------------------------------------------------------------

    def _write_plan(self, solution: Solution, choice: Choice, removed: Tensor, criterion: Criterion) -> PruningPlan:
        layers: dict[str, LayerPlan] = {}
        for name, use in self.layers.items():
            layer = self._layer_plan(name, use, solution)
            if layer is not None:
                layers[name] = layer
        chosen, stays = removed[choice.unit], solution.kept[choice.gammas]
        gone = int((chosen & ~stays).sum())
        got = {"removed": gone, "candidates": len(choice.gammas), "ratio": gone / len(choice.gammas)}
        got |= {"restored": int((chosen & stays).sum()), "dead": int((~solution.kept).sum()) - gone}
        got |= self.cost_share(solution)
        got["highest_score"] = float(choice.score[removed].max()) if bool(removed.any()) else None
        return PruningPlan(
            fingerprint=fingerprint(self.model),
            network=describe_network(self.model),
            spec=self.spec,
            keep={n: p.outs for n, p in layers.items() if p.kind == "norm" and len(p.outs) < p.size[1]},
            layers=layers,
            asked=criterion.describe(),
            got=got,
            train_watched=not self.train_reason,
            train_reason=self.train_reason,
            attributes=self._attributes(solution),
            compare="layers" if any(r.split(" in ")[0] in CHOOSING for r in self.unknown) else "outputs",
        )

    def _attributes(self, solution: Solution) -> list[list]:
        """Return the sizes in attributes that change; see PruningPlan."""
        counts = [(r.size, int(solution.live[self.component[r.atoms]].sum())) for r in self.tape.resizes]
        try:
            return [[*attribute, value] for attribute, value in new_values(counts, self.model).items()]
        except ValueError as error:
            raise PlanError(f"sizes kept in attributes cannot follow this choice: {error}") from error

    def _layer_plan(self, name: str, use: Use, solution: Solution) -> LayerPlan | None:
        live = solution.live
        if use.kind == "norm":
            return self._norm_plan(name, use, solution)
        reads, writes = live[self.component[use.read]], live[self.component[use.write]]
        if bool(reads.all()) and bool(writes.all()):
            return None
        size = (len(reads), len(writes))
        if use.kind == "grouped":
            reads = reads.view(use.groups, -1)[0]
            size = (len(reads), size[1])
        return LayerPlan(use.kind, _indices(reads), _indices(writes), size)

    def _norm_plan(self, name: str, use: Use, solution: Solution) -> LayerPlan | None:
        live, norm = solution.live, self.norms.get(name)
        kept = solution.kept[norm.all] if norm is not None else live[self.component[use.write]]
        source, target = live[self.component[use.source]], live[self.component[use.target]]
        module = self.modules[name]
        old = [getattr(module, side, None) for side in ("select", "scatter")]  # of a SelectBatchNorm
        selects, scatters = (
            _position_among_kept(stay, index)[kept] for stay, index in ((source, old[0]), (target, old[1]))
        )
        n = int(kept.sum())
        straight = torch.arange(n)
        select = None if n == int(source.sum()) and torch.equal(selects, straight) else selects.tolist()
        scatter = None if n == int(target.sum()) and torch.equal(scatters, straight) else scatters.tolist()
        before = [None if t is None else t.tolist() for t in old]
        if bool(kept.all()) and [select, scatter] == before and int(target.sum()) == len(target):
            return None
        indices = _indices(kept)
        return LayerPlan("norm", indices, indices, (len(kept), len(kept)), select, scatter, int(target.sum()))

    def _check_prunable(self) -> None:
        if self.norms:
            return
        frozen = [n for n, m in self.model.named_modules() if type(m).__name__.startswith("FrozenBatchNorm")]
        if frozen:
            raise GraphError(
                f"the network's {len(frozen)} FrozenBatchNorm layers ({frozen[0]}, ...) have scales that do not train: "
                "build it with BatchNorm (norm_layer=nn.BatchNorm2d) and train those with the penalty"
            )
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.model.modules()):
            raise GraphError(
                "no BatchNorm of the network has scales and ran on the example input as a layer of its own"
            )
        instead = other_norms(self.model)
        raise GraphError(
            f"the network has no BatchNorm scales to choose by{instead and f' ({instead})'}: insert nn.BatchNorm2d after its "
            "convolutions (before the activation) and train with the penalty"
        )

    def _why_not(self) -> str:
        if not any(n.trainable for n in self.norms.values()):
            return "all have requires_grad=False; set it to True and train with the penalty"
        reasons = self.unknown[:3] or ["they are tied to inputs, outputs or layers without BatchNorm"]
        return "; ".join(reasons) + "; try ties='apart'"

    def shares(self) -> dict[str, Any]:
        """Say how much of the network a plan can choose from.

        Returns:
            gammas: how many there are; together, apart: shares of them that may be chosen; blocked: {reason: share} of
            those that `together` leaves alone.
        """
        return explain.shares(self)

    def describe(self) -> str:
        """Return a table for people: every BatchNorm, what may go, and what was frozen and why."""
        return explain.describe(self)


def _wanted(size: int, have: int, options: PlanOptions) -> int:
    """Return how many of `size` gammas the constraints want where `have` are kept."""
    wanted = max(have, options.min_channels, size - int(options.max_layer_ratio * size + 1e-9))
    return min(size, -(-wanted // options.round_to) * options.round_to)


def _components(count: int, ties: list[Tensor]) -> Tensor:
    """Return the smallest atom of every atom's class: union-find by hooking and pointer jumping, vectorised."""
    label = torch.arange(count)
    if not ties:
        return label
    a, b = torch.cat(ties, 1)
    while True:
        la, lb = label[a], label[b]
        apart = la != lb
        if not bool(apart.any()):
            return label
        a, b, la, lb = a[apart], b[apart], la[apart], lb[apart]
        low = torch.minimum(la, lb)
        new = label.scatter_reduce(0, la, low, "amin").scatter_reduce(0, lb, low, "amin")
        while not torch.equal(new, jumped := new[new]):
            new = jumped
        label = new


def _position_among_kept(stay: Tensor, index: Tensor | None) -> Tensor:
    """Return where each channel of `index` (None: all) lies among those that stay."""
    position = stay.long().cumsum(0) - 1
    return position if index is None else position[index.cpu()]


def _indices(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


def _parameters(model: nn.Module, modules: dict[str, nn.Module], name: str) -> list[nn.Parameter]:
    """Return the parameters of a layer: of a module, or a parameter that its parent holds directly."""
    if name in modules:
        return [p for p in modules[name]._parameters.values() if p is not None]
    owner, _, attribute = name.rpartition(".")
    tensor = getattr(model.get_submodule(owner), attribute)
    return [tensor] if isinstance(tensor, nn.Parameter) else []


def _weight(model: nn.Module, modules: dict[str, nn.Module], name: str) -> nn.Parameter:
    return modules[name].weight if name in modules else model.get_parameter(name)
