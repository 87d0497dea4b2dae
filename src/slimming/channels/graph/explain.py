"""What a channel graph tells people: how much may be chosen, and why the rest may not."""

import re
from typing import Any

import torch
from torch import Tensor

from slimming.channels.atoms import FROZEN
from slimming.channels.graph.aligned import Aligned
from slimming.channels.graph.candidates import decided_aligned, decided_together, trainable_gammas
from slimming.channels.graph.liveness import zero_atoms
from slimming.channels.graph.structure import Structure
from slimming.channels.options import REDUCED
from slimming.channels.plan import describe_network


def kind_of(reason: str) -> str:
    """Return a reason without its layer and without numbers."""
    return re.sub(r"\[[-\d, ]+\]", "[...]", re.sub(r" in [^:]*(?=:)", "", reason))


def shares(graph: Structure) -> dict[str, Any]:
    """Return how much of the network a plan can choose from.

    Returns:
        gammas: how many there are; together, apart, aligned: shares of them that may be chosen; blocked: {reason: share} of
        those that may not be chosen together; blocked_aligned: the same for aligned.
    """
    apart, aligned = trainable_gammas(graph), Aligned(graph)
    decided = {"together": decided_together(graph, apart)[0], "aligned": decided_aligned(aligned, apart)[0]}
    reasons = {ties: _blocked(g, ~decided[ties], apart) for ties, g in (("together", graph), ("aligned", aligned))}

    def share(gammas: Tensor | int) -> float:
        return int(gammas if isinstance(gammas, int) else gammas.sum()) / max(1, graph.count)

    return {
        "gammas": graph.count,
        **{ties: share(free) for ties, free in {**decided, "apart": apart}.items()},
        "blocked": {reason: share(count) for reason, count in reasons["together"].items()},
        "blocked_aligned": {reason: share(count) for reason, count in reasons["aligned"].items()},
    }


def _blocked(graph: Structure, gammas: Tensor, trainable: Tensor) -> dict[str, int]:
    """Count `gammas` (all gammas,) bool by the first reason for which they cannot be decided together, or aligned."""

    def marked(*parts: Tensor) -> Tensor:
        mask = torch.zeros(graph.tape.count, dtype=torch.bool)
        mask[torch.cat(parts)] = True
        return mask

    frozen_by: dict[str, list[Tensor]] = {}
    for atoms, reason in [*graph.frozen_for, (torch.tensor([FROZEN]), "tied to an input or a constant")]:
        frozen_by.setdefault(kind_of(reason), []).append(graph.component[atoms])
    reads, writes, own = graph.norm_sides
    zero = zero_atoms(graph, ~trainable, graph.silenced(~trainable))
    untrained = (own < 0) | ~torch.cat((trainable, trainable.new_zeros(1)))[own]
    tests = [("not trained, or of a BatchNorm that stays whole", marked(writes[untrained]))]
    tests += [(reason, marked(*parts)) for reason, parts in frozen_by.items()]
    weighed = graph.component[graph.weighed[~zero[graph.weighed]]]
    tests += [("not zero where it is read, although its gammas are pruned", marked(weighed))]
    if not isinstance(graph, Aligned):
        tests += [("read by a BatchNorm that writes elsewhere", marked(reads))]
    tests += [("tied to one of these", torch.ones(graph.tape.count, dtype=torch.bool))]
    found, left = {}, gammas.clone()
    for reason, mask in tests:
        hit = left & mask[graph.slots]
        left &= ~hit
        if bool(hit.any()):
            found[reason] = int(hit.sum())
    return found


def summary(graph: Structure) -> list[str]:
    """Return lines for people: how many gammas may be chosen, and why the others may not."""
    found = shares(graph)
    chosen = ", ".join(f"{ties} {found[ties]:.1%}" for ties in REDUCED)
    lines = [f"{found['gammas']:,} gammas; may be chosen: {chosen}"]
    for ties, key in (("together", "blocked"), ("aligned", "blocked_aligned")):
        lines += [f"  not {ties}, {share:.1%}: {reason}" for reason, share in found[key].items()]
    return lines


def describe(graph: Structure) -> str:
    """Return a table for people: every BatchNorm, what may go, and what was frozen and why."""
    together, _ = decided_together(graph, trainable_gammas(graph))
    lines = [
        describe_network(graph.model),
        f"{'BatchNorm':40} {'gammas':>7} {'tied, may go':>13} {'|gamma| median':>15}",
    ]
    for norm in graph.norms.values():
        weight = norm.module.weight.detach().abs()
        free = int(together[norm.all].sum()) if norm.trainable else 0
        lines.append(f"{norm.name:40} {len(weight):7} {free:13} {float(weight.median()):15.3g}")
    total = sum(n.module.num_features for n in graph.norms.values() if n.trainable)
    lines.append(f"{'all':40} {graph.count:7} {int(together.sum()):13}   (apart: {total})")
    lines += summary(graph)
    lines += [f"frozen: {reason}" for reason in graph.unknown]
    if graph.train_reason:
        lines.append(f"not watched in train mode: {graph.train_reason}")
    return "\n".join(lines)
