"""What a channel costs after the best repair: the loss that no refit of the layers that read it makes up for.

A layer that loses an input channel can be refitted to what it gave, as `repair` does. What remains of the error is, for every
output,  w' [(H^-1)_cc]^-1 w,  with H the Gram matrix of the layer's inputs, c those of the channel and w their weights. As a
share of the variance of the layer's outputs, it is comparable between layers.

The channels are taken out one after the other, the cheapest first, each time with the layers refitted: of two channels that say
the same, one is cheap, and then the other is dear. A channel's score is what it costs when its turn comes.

Sources: Hassibi and Stork, Optimal Brain Surgeon, NeurIPS 1992, for blocks of inputs; Frantar and Alistarh, Optimal Brain
Compression, NeurIPS 2022, arXiv:2208.11580, for one after the other.
"""

import math
from collections.abc import Iterable, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from slimming.channels.atoms import FROZEN, components
from slimming.channels.copying import shallow_copy
from slimming.channels.graph.structure import Structure
from slimming.channels.owners import Owner
from slimming.channels.repair.least_squares import Equations, applied, at, draw_positions
from slimming.channels.repair.refit import LARGEST, RIDGE, ROWS
from slimming.channels.repair.survey import LayerCalls, Survey
from slimming.channels.tape import CARRYING
from slimming.errors import GraphError

STEPS = 64  # of so many channels that are left, one is taken out at once: few networks need more than that


def reconstruction(graph: Structure, batches: Iterable[Any]) -> Tensor:
    """Return what every channel costs when its turn comes, (all gammas,) float64; nan where nothing is known of what reads it.

    Gammas that write one channel get its cost; the costs of all layers that read a channel add up.

    Args:
        batches: inputs (N, C, H, W) as in training, on the network's device; or (inputs, labels). About 2000 images.

    Raises:
        GraphError: no batches, or a layer whose Gram matrix would be too large.
    """
    inputs = [batch[0] if isinstance(batch, list | tuple) else batch for batch in batches]
    if not inputs:
        raise GraphError("score=reconstruction needs data: give plan(..., batches=) at least one batch of inputs")
    cost = torch.full((graph.tape.count,), math.nan, dtype=torch.float64)
    found = _readers(graph, inputs)
    for readers in _pools(graph, [reader for parts in found.values() for reader in parts]):
        read = torch.cat([reader.inputs for reader in readers]).unique()
        read = read[read != FROZEN]
        _take_out(readers, read[~graph.frozen[read]], cost)
        _take_out(readers, read[graph.frozen[read]], cost)  # these cannot go: last
    _hand_back(graph, cost, found.keys())
    return cost[graph.slots]


class Reader:
    """Outputs of a layer that read the same inputs, and the inputs that are left.

    Args:
        inputs: (n,) component of each input; an input channel of a convolution has one input for every kernel tap.
        gram: (n, n) products of the inputs, with the ridge.
        weight: (outputs, n).

    Attributes:
        costs: components (k,) that are left, and what each costs if it goes next, (k,).
    """

    def __init__(self, inputs: Tensor, gram: Tensor, weight: Tensor) -> None:
        self.inputs, self.weight = inputs, weight
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        self.costs = self._costs()

    def _costs(self) -> tuple[Tensor, Tensor]:
        """Return the components that are left, (k,), and what each costs if it goes next."""
        component, count = self.inputs.unique(return_counts=True)
        order, cost = self.inputs.argsort(stable=True), torch.zeros(len(component), dtype=torch.float64)
        for size in count[component != FROZEN].unique().tolist():
            these = (count == size) & (component != FROZEN)
            columns = order[these.repeat_interleave(count)].view(-1, size)  # (k, size)
            block = self.inverse[columns[:, :, None], columns[:, None, :]]
            lost = self.weight[:, columns].permute(1, 2, 0)  # (k, size, outputs)
            cost[these] = (lost * torch.linalg.solve(block, lost)).sum((1, 2))
        return component, cost

    def take_out(self, gone: Tensor) -> None:
        """Remove components and refit the weights of what is left."""
        goes = torch.isin(self.inputs, gone)
        if not bool(goes.any()):
            return
        across = self.inverse[~goes][:, goes]
        refit = torch.linalg.solve(self.inverse[goes][:, goes], across.mT)  # (inputs that go, inputs that are left)
        self.weight = self.weight[:, ~goes] - self.weight[:, goes] @ refit
        self.inverse = self.inverse[~goes][:, ~goes] - across @ refit
        self.inputs = self.inputs[~goes]
        self.costs = self._costs()


def _take_out(readers: list[Reader], left: Tensor, cost: Tensor) -> None:
    """Take components (k,) out of the layers that read them, the cheapest first, and write what each costs into `cost`."""
    top = 0.0
    while len(left):
        now = torch.zeros_like(cost)
        for reader in readers:
            now.index_add_(0, *reader.costs)
        values, order = now[left].sort(stable=True)
        gone = order[: max(1, len(left) // STEPS)]
        for component, value in zip(left[gone].tolist(), values.tolist(), strict=False):
            top = max(value, math.nextafter(top, math.inf))  # what goes later never scores less
            cost[component] = top
        for reader in readers:
            reader.take_out(left[gone])
        left = left[torch.isin(left, left[gone], invert=True)]


# --- what reads what --------------------------------------------------------------------------------------------------


class _Watched(LayerCalls):
    """Adds up the equations of all layers that read channels that may go."""

    def __init__(self, graph: Structure, batches: Sequence[Tensor]) -> None:
        super().__init__(shallow_copy(graph.model).eval())
        layers = {name: step for name, step in graph.layers.items() if step.use.kind not in CARRYING}
        self.wanted = {name for name, step in layers.items() if bool((step.reads != FROZEN).any())}
        self.equations: dict[str, Equations] = {}
        self.rows = max(1, ROWS // len(batches))
        for batch in batches:
            self.run(batch)

    def layer(self, owner: Owner, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        if owner.layer in self.wanted:
            call = applied(func, args, kwargs)
            if call.groups * call.weight[0].numel() ** 2 > LARGEST**2:
                raise GraphError(
                    f"score=reconstruction: {owner.layer} has {call.weight[0].numel():,} inputs to one output, more than "
                    f"{LARGEST:,}: take another score"
                )
            flat = out.reshape(-1, out.shape[-1]) if call.weight.ndim == 2 else out
            positions = draw_positions(flat, self.rows)
            equations = self.equations.setdefault(owner.layer, Equations(call.weight, call.groups))
            equations.add(call, positions, at(flat, positions))
        return out


def _readers(graph: Structure, batches: Sequence[Tensor]) -> dict[str, list[Reader]]:
    """Return one reader for each group of every layer that runs as a convolution or linear layer, by layer."""
    survey, found = Survey(shallow_copy(graph.model).eval()), {}
    survey.run(batches[0][:2])
    for name, equations in _Watched(graph, batches).equations.items():
        groups, weight = equations.groups, equations.weight
        gram, _ = equations.normal(RIDGE, intercept=name in survey.biased or bool(survey.norm_behind(name)))
        weights = weight.double().reshape(groups, -1, weight[0].numel())
        power = (weights @ gram * weights).sum().clamp_min(torch.finfo(torch.float64).tiny)
        inputs = graph.layers[name].reads.view(groups, -1).repeat_interleave(weight[0, 0].numel(), 1)
        parts = (inputs, (gram / power).cpu(), weights.cpu())
        found[name] = [Reader(*part) for part in zip(*parts, strict=True)]
    return found


def _pools(graph: Structure, readers: list[Reader]) -> list[list[Reader]]:
    """Group the readers that have to be looked at together: they read a common component."""
    pairs = [r.inputs[r.inputs != FROZEN].unique() for r in readers]
    label = components(graph.tape.count, [torch.stack((p[:1].expand_as(p), p)) for p in pairs])
    pools: dict[int, list[Reader]] = {}
    for reader, read in zip(readers, pairs, strict=True):
        if len(read):
            pools.setdefault(int(label[read[0]]), []).append(reader)
    return list(pools.values())


def _hand_back(graph: Structure, cost: Tensor, measured: Set[str]) -> None:
    """Let a channel that a BatchNorm reads cost what those cost that it writes; where something unknown reads it: nan.

    Args:
        measured: names of the layers whose readers are in `cost`.
    """
    for step in reversed(graph.layers.values()):
        if step.use.kind == "norm":
            on = step.reads != step.writes
            handed = torch.zeros_like(cost).index_add_(0, step.reads[on], cost[step.writes[on]])
            cost[step.reads[on]] = cost[step.reads[on]].nan_to_num() + handed[step.reads[on]]
        elif step.use.kind not in CARRYING and step.use.name not in measured:
            cost[step.reads] = math.nan
