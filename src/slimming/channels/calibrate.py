"""Re-estimating BatchNorm statistics after pruning: what keeps the accuracy."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from slimming.channels.copying import copy_model
from slimming.channels.modes import set_training
from slimming.errors import GraphError


def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Return a copy, in eval mode, whose running statistics are the average over the batches; weights stay as they are.

    A channel that was removed fed the constant of its beta into the next layer. That constant is gone, and the old
    statistics still expect it.

    Args:
        batches: inputs (N, C, H, W) as in training, augmentation included, on the model's device; or (inputs, labels).

    Raises:
        GraphError: no batches.
    """
    calibrated = set_training(copy_model(model))
    norms = [
        m for m in calibrated.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
    count = 0
    with torch.no_grad():
        for batch in batches:
            calibrated(batch[0] if isinstance(batch, list | tuple) else batch)
            count += 1
    if not count:
        raise GraphError("calibration needs at least one batch")
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return calibrated.eval()
