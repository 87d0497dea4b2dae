"""How much the loss changes, to first order, when a channel's gamma and beta become zero."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slimming.channels.copying import copy_model
from slimming.channels.graph.structure import Structure
from slimming.errors import GraphError


def taylor(graph: Structure, batches: Iterable[Any]) -> Tensor:
    """Return the mean over the batches of (gamma * dL/dgamma + beta * dL/dbeta)^2, in eval mode, (all gammas,) float64.

    L is the cross-entropy of the batch's labels.

    Source: Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, arXiv:1906.10771, section 3.1.

    Args:
        batches: (inputs (N, C, H, W), labels (N,)) as in training, on the network's device.

    Raises:
        GraphError: no batches, a batch without labels, or a network whose outputs are no logits of classes.
    """
    model = copy_model(graph.model).eval()
    norms = [model.get_submodule(name) for name in graph.norms]
    pairs = [parameter.requires_grad_() for norm in norms for parameter in (norm.weight, norm.bias)]
    total, count = torch.zeros(graph.count, dtype=torch.float64), 0
    for batch in batches:
        with torch.enable_grad():
            gradients = torch.autograd.grad(_loss(model, batch), pairs)
        changes = [(p * g).detach().double().cpu() for p, g in zip(pairs, gradients, strict=True)]
        total += (torch.cat(changes[::2]) + torch.cat(changes[1::2])).square()
        count += 1
    if not count:
        raise GraphError("score=taylor needs data: give plan(..., batches=) at least one batch of inputs and labels")
    return total / count


def _loss(model: torch.nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise GraphError("score=taylor needs labels: every batch must be (inputs, labels)")
    inputs, labels = batch
    logits = model(inputs)
    if not isinstance(logits, Tensor) or logits.shape[:1] + logits.shape[2:] != labels.shape:
        got = f"{list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise GraphError(
            f"score=taylor needs logits (N, classes, ...) for labels (N, ...), got {got} for {list(labels.shape)}: compute "
            "the scores yourself and give plan(..., score={layer: tensor})"
        )
    return F.cross_entropy(logits, labels)
