"""What a thin network will cost, without making it."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from slimming.channels.graph.structure import Structure
from slimming.channels.tape import CARRYING


def count_cost(graph: Structure, live: Tensor | None, kept: Tensor | None) -> dict[str, int]:
    """Count {macs, params} of what lives (None: of everything) in the layers that rules resize, and other MACs."""
    macs, params, seen = graph.tape.other_macs, 0, set()
    uses, products = graph.recording.evaluated
    gammas = graph.count_gammas(kept)
    for number, (step, (reads, writes)) in enumerate(zip(graph.steps, graph.count_sides(live), strict=True)):
        use = step.use
        if use.kind == "norm":
            weights = 2 * gammas.get(use.name, 0)
        else:
            reads = 1 if use.kind in CARRYING else reads
            weights = reads * writes // (use.groups if use.kind == "grouped" else 1) * use.kernel
            macs += use.positions * weights * (number < uses)
            weights += writes * use.bias
        params += weights * (use.name not in seen)
        seen.add(use.name)
    for product in graph.tape.products[:products]:
        count = len(product.atoms) if live is None else int(torch.count_nonzero(live[graph.component[product.atoms]]))
        macs += product.macs * count
    return {"macs": macs, "params": params}


def component_macs(graph: Structure) -> Tensor:
    """Return the MACs of everything that reads or writes a component, in the dense network, (atoms,) float64.

    What a BatchNorm alone reads goes with the channel that it writes.
    """
    macs = torch.zeros(graph.tape.count, dtype=torch.float64)
    uses, products = graph.recording.evaluated
    for use, reads, writes, _ in graph.steps[:uses]:
        if use.kind == "norm":
            continue
        each = float(use.positions * use.kernel)
        if use.kind in CARRYING:
            macs[writes] += each
            continue
        for side, other in ((reads, writes), (writes, reads)):
            macs.index_add_(0, side, torch.full((len(side),), each * len(other) / use.groups, dtype=torch.float64))
    for product in graph.tape.products[:products]:
        atoms = graph.component[product.atoms]
        macs.index_add_(0, atoms, torch.full((len(atoms),), float(product.macs), dtype=torch.float64))
    readers = torch.cat([step.reads.unique() for step in graph.layers.values()]).bincount(minlength=graph.tape.count)
    for step in graph.layers.values():
        if step.use.kind == "norm":
            alone = (readers[step.reads] == 1) & (step.reads != step.writes)
            macs.index_add_(0, step.writes[alone], macs[step.reads[alone]])
    return macs


def count_other_params(graph: Structure) -> int:
    """Count parameters of layers that no rule resizes."""
    total = sum(p.numel() for p in graph.model.parameters())
    own = {id(p): p for name in graph.layers for p in _parameters(graph, name)}
    return total - sum(p.numel() for p in own.values())


def _parameters(graph: Structure, name: str) -> Iterator[nn.Parameter]:
    """Yield the parameters of a layer: of a module, or a parameter that its parent holds directly."""
    if name in graph.modules:
        yield from (p for p in graph.modules[name]._parameters.values() if p is not None)
        return
    owner, _, attribute = name.rpartition(".")
    tensor = getattr(graph.model.get_submodule(owner), attribute)
    if isinstance(tensor, nn.Parameter):
        yield tensor
