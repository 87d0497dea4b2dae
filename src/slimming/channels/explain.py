"""What a channel graph says of itself to people: how much may be chosen, and why the rest may not."""

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slimming.channels.plan import describe_network
from slimming.channels.tape import CARRYING, FROZEN

if TYPE_CHECKING:
    from slimming.channels.graph import ChannelGraph


def kind_of(reason: str) -> str:
    """Return a reason without where it holds and without numbers."""
    return re.sub(r"\[[-\d, ]+\]", "[...]", re.sub(r" in [^:]*(?=:)", "", reason))


def shares(graph: "ChannelGraph") -> dict[str, Any]:
    """Say how much of the network a plan can choose from.

    Returns:
        gammas: how many there are; together, apart: shares of them that may be chosen; blocked: {reason: share} of
        those that `together` leaves alone.
    """
    free = {ties: graph.candidates(ties) for ties in ("together", "apart")}
    reasons = _blocked(graph, ~free["together"])
    return {
        "gammas": graph.count,
        **{ties: int(chosen.sum()) / max(1, graph.count) for ties, chosen in free.items()},
        "blocked": {reason: count / max(1, graph.count) for reason, count in reasons.items()},
    }


def _blocked(graph: "ChannelGraph", gammas: Tensor) -> dict[str, int]:
    """Count (all gammas,) bool by the first reason for which they cannot be decided together."""
    frozen_by: dict[str, Tensor] = {}
    for atoms, reason in [*graph.tape.frozen, (torch.tensor([FROZEN]), "tied to an input or a constant")]:
        hit = frozen_by.setdefault(kind_of(reason), torch.zeros(graph.tape.count, dtype=torch.bool))
        hit[graph.component[atoms]] = True
    trainable = graph.candidates("apart")
    read_by_norm = torch.zeros(graph.tape.count, dtype=torch.bool)
    read_nonzero, stuck = read_by_norm.clone(), read_by_norm.clone()
    zero = graph.zero_atoms(~trainable)
    for use, reads, writes in zip(graph.tape.uses, graph._reads, graph._writes, strict=True):
        if use.kind == "norm":
            read_by_norm[reads] = True
            norm = graph.norms.get(use.name)
            stuck[writes if norm is None else writes[~trainable[norm.all]]] = True
        elif use.kind not in CARRYING:
            read_nonzero[reads[~zero[use.read]]] = True
    tests = [("not trained, or of a BatchNorm that stays whole", stuck), *frozen_by.items()]
    tests += [("not zero where it is read, although its gammas are pruned", read_nonzero)]
    tests += [("read by a BatchNorm that writes elsewhere", read_by_norm)]
    found, left, slots = {}, gammas.clone(), graph.slots()
    for reason, classes in [*tests, ("tied to one of these", torch.ones_like(stuck))]:
        hit = left & classes[slots]
        left &= ~hit
        if bool(hit.any()):
            found[reason] = int(hit.sum())
    return found


def summary(graph: "ChannelGraph") -> list[str]:
    """Return lines for people: how many gammas may be chosen, and why the others may not."""
    found = shares(graph)
    lines = [f"{found['gammas']:,} gammas; may be chosen: together {found['together']:.1%}, apart {found['apart']:.1%}"]
    return lines + [f"  not together, {share:.1%}: {reason}" for reason, share in found["blocked"].items()]


def describe(graph: "ChannelGraph") -> str:
    """Return a table for people: every BatchNorm, what may go, and what was frozen and why."""
    together = graph.candidates("together")
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
