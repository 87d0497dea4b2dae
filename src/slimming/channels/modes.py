"""Train mode without chance: dropout and stochastic depth stay off, so that two runs can be compared."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimming.channels.copying import shallow_copy
from slimming.channels.layers import has_plain_forward
from slimming.channels.tape import Tape
from slimming.channels.watch import watch

RANDOM = ("Dropout", "StochasticDepth", "DropPath")  # in class names of layers that are switched off


def set_training(model: nn.Module, norms: bool = True) -> nn.Module:
    """Put all modules into train mode except random ones and, unless `norms`, BatchNorms that run alike in both modes."""
    model.train()
    alike: dict[tuple[object, ...], bool] = {}
    for module in model.modules():
        random = any(word in type(module).__name__ for word in RANDOM)
        if random or (not norms and isinstance(module, _BatchNorm) and _runs_alike(module, alike)):
            module.eval()
    return model


def _runs_alike(norm: _BatchNorm, seen: dict[tuple[object, ...], bool]) -> bool:
    """Return whether a BatchNorm calls the same operators in both modes; tried once for each class and its settings."""
    if has_plain_forward(norm):
        return True
    plain = {k: v for k, v in vars(norm).items() if isinstance(v, int | float | str | None) and k != "num_features"}
    key = (type(norm), *map(type, norm.modules()), *sorted(map(repr, plain.items())))
    if key not in seen:
        seen[key] = any(_try(norm, (2, norm.num_features, *(2,) * dims)) for dims in (2, 1, 0, 3))
    return seen[key]


def _try(norm: _BatchNorm, shape: tuple[int, ...]) -> bool:
    """Run a BatchNorm in both modes; return whether it runs on this shape and calls the same operators."""
    weight = next(iter(norm._parameters.values()))
    example = torch.ones(shape) if weight is None else torch.ones(shape, dtype=weight.dtype, device=weight.device)
    logs = []
    try:
        for training in (False, True):
            log = watch(Tape(), shallow_copy(norm).train(training), example).log
            # batch_norm's statistics and mode may differ, nothing else
            logs.append([call[:4] if call[0] is torch.ops.aten.batch_norm.default else call for call in log])
    except Exception:
        return False
    return logs[0] == logs[1]
