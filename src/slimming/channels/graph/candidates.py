"""Which gammas a criterion may choose, and which of them it must decide as one."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from slimming.channels.atoms import components
from slimming.channels.graph.aligned import Aligned
from slimming.channels.graph.liveness import needed_by_products, zero_atoms
from slimming.channels.graph.structure import Structure
from slimming.errors import check_patterns


def trainable_gammas(graph: Structure, ignore: Iterable[str] = ()) -> Tensor:
    """Return which gammas are trainable and not of a BatchNorm to ignore, (all gammas,) bool.

    Raises:
        ConfigError: a pattern to ignore that matches no BatchNorm.
    """
    norms = (n for n, m in graph.modules.items() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    check_patterns("ignore", ignore, norms, "BatchNorm")
    trainable = torch.zeros(graph.count, dtype=torch.bool)
    for norm in graph.norms.values():
        trainable[norm.all] = norm.trainable and not any(fnmatchcase(norm.name, p) for p in ignore)
    return trainable


def decided_together(graph: Structure, trainable: Tensor) -> tuple[Tensor, Tensor]:
    """Return which of the trainable gammas may be decided together, and the class of every gamma; (all gammas,) each."""
    pairs = _pairs(graph, trainable)
    free = _free_components(graph, trainable, pairs)
    classes = components(graph.tape.count, [pairs[:, free[pairs[0]]]])
    return trainable & free[graph.slots], classes[graph.slots]


def decided_aligned(graph: Aligned, trainable: Tensor) -> tuple[Tensor, Tensor]:
    """Return which of the trainable gammas may go with their whole class, and the class of every gamma; (all gammas,) each.

    A class is free where all of its gammas are trainable, nothing of it is frozen, and it is zero, once they are pruned and its
    bare filters are zeros, wherever a layer reads it.
    """
    zero = zero_atoms(graph, ~trainable, graph.silenced(~trainable))
    blocked = graph.frozen.clone()
    blocked[graph.slots[~trainable]] = True
    blocked[graph.component[graph.weighed[~zero[graph.weighed]]]] = True
    blocked[needed_by_products(graph, zero)] = True
    return ~blocked[graph.slots], graph.slots


def _free_components(graph: Structure, trainable: Tensor, pairs: Tensor) -> Tensor:
    """Return which components die with the trainable gammas that write them, (atoms,) bool.

    Args:
        pairs: (2, n) components that one BatchNorm reads and writes, decided as one: the first is free only if the second
            is.
    """
    zero = zero_atoms(graph, ~trainable)
    blocked = graph.frozen.clone()
    paired = torch.zeros_like(blocked)
    paired[pairs[0]] = True
    reads, _, _ = graph.norm_sides
    blocked[reads[~paired[reads]]] = True
    blocked[graph.component[graph.weighed[~zero[graph.weighed]]]] = True
    blocked[needed_by_products(graph, zero)] = True
    blocked[graph.slots[~trainable]] = True
    count = -1
    while count != (count := int(blocked.sum())):
        blocked[pairs[0][blocked[pairs[1]]]] = True
    return ~blocked


def _pairs(graph: Structure, trainable: Tensor) -> Tensor:
    """Return (2, n) components that BatchNorms read and write, where all that read the one write the other.

    They are decided as one: a depthwise convolution's BatchNorm and the one before it, or the branches of
    re-parameterised blocks. A stream whose readers write elsewhere (dense and pre-activation networks) is no pair: its
    readers select.
    """
    reads, writes, gammas = graph.norm_sides
    good = (gammas >= 0) & torch.cat((trainable, trainable.new_zeros(1)))[gammas]
    lowest = torch.full((graph.tape.count,), graph.tape.count)
    highest = torch.full((graph.tape.count,), -1)
    lowest.scatter_reduce_(0, reads, torch.where(good, writes, -1), "amin")
    highest.scatter_reduce_(0, reads, writes, "amax")
    read = (lowest == highest).nonzero().flatten()
    return torch.stack((read, highest[read]))
