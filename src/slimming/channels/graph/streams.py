"""Which gammas have to vanish together for a channel to leave every tensor that it lives in."""

import torch
from torch import Tensor

from slimming.channels.atoms import components
from slimming.channels.graph.structure import Structure


def streams(graph: Structure) -> Tensor:
    """Return the stream of every gamma, (all gammas,): equal for all that write or read one channel that may go.

    So one are the gammas that write into a residual stream, those that read a channel of a pre-activation or dense stream,
    and those before and behind a depthwise convolution. A gamma of a plain chain is alone.
    """
    reads, writes, gammas = graph.norm_sides
    ties = []
    for side in (reads, writes):
        joins = (gammas >= 0) & ~graph.frozen[side]  # all that is frozen is one component, and never vanishes
        ties.append(torch.stack((graph.tape.count + gammas[joins], side[joins])))
    return components(graph.tape.count + graph.count, ties)[graph.tape.count :]
