"""Checkpoints of the reference implementations in PyTorch: VGG, pre-activation ResNet and DenseNet, dense or pruned.

Such a file is {"state_dict": ..., "cfg": ...} with the layer names of `slimming.models`, some below `module.`. A pruned
ResNet or DenseNet keeps its BatchNorms whole and picks channels behind them by a 0/1 vector `<block>.select.indexes`.

A file is read into the dense network: what it lacks is zero there, gammas and betas included. That computes the same, and
the ordinary plan that removes these zeros makes it thin.
"""

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimming import checkpoint
from slimming.channels.criteria import Choice, Criterion
from slimming.channels.surgery import prune
from slimming.channels.trace import trace
from slimming.errors import CheckpointError
from slimming.untrusted import check_tensors

SELECT = "select.indexes"


def read(path: str | os.PathLike) -> dict[str, Tensor] | None:
    """Return the weights of such a checkpoint without `module.`, None if the file is not one.

    Older ones keep the best accuracy as a numpy scalar beside the weights; its three constructors are allowed on top of what
    weights_only allows, because they build numbers only.

    Raises:
        CheckpointError: missing, damaged, holding code (which is not run), or tensors that are not what they claim.
    """
    scalar = np._core.multiarray.scalar if hasattr(np, "_core") else np.core.multiarray.scalar
    numbers = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)]
    allowed: list[Any] = [(scalar, "numpy.core.multiarray.scalar"), scalar, np.dtype, *numbers]
    with torch.serialization.safe_globals(allowed):
        content = checkpoint.read_data(path)
    state = content.get("state_dict") if isinstance(content, dict) and "slimming" not in content else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        return None
    weights = {str(k).removeprefix("module."): v for k, v in state.items()}
    if not any(k.startswith("feature.") for k in weights) and "conv1.weight" not in weights:
        return None
    check_tensors(state, path)
    return weights


def io_shape(weights: dict[str, Tensor]) -> dict[str, int]:
    """Return {num_classes, in_channels} of the network: from its last linear and its first convolutional weight.

    Raises:
        CheckpointError: it has none.
    """
    matrices = [w for w in weights.values() if w.ndim == 2]
    filters = [w for w in weights.values() if w.ndim == 4]
    if not matrices or not filters:
        raise CheckpointError("the checkpoint is malformed: it lacks a linear or a convolutional weight")
    return {"num_classes": len(matrices[-1]), "in_channels": filters[0].shape[1]}


def convert(weights: dict[str, Tensor], dense: nn.Module, example: Tensor, path: str | os.PathLike):
    """Return (network, plans): the file's network, thin if it was pruned, and the plans that lead to it from `dense`.

    Args:
        weights: as `read` gives them.
        dense: the network before pruning; it is filled.
        example: (1, C, H, W) for the trace.

    Raises:
        CheckpointError: the weights are of another architecture.
    """
    kept = _embed(weights, dense, path)
    dense.eval()
    if all(bool(k.all()) for k in kept.values()):
        return dense, []
    graph = trace(dense, example)
    plan = graph.plan(_Given([kept[name] for name in graph.norms]), ties="apart")
    return prune(dense, plan), [plan]


class _Given(Criterion):
    """Removes what is not in `kept`: (C,) bool per BatchNorm, in the order of the layers."""

    def __init__(self, kept: list[Tensor]):
        self.kept = kept

    def choose(self, choice: Choice) -> Tensor:
        return ~torch.cat(self.kept)[choice.gammas]

    def describe(self) -> dict:
        return {"criterion": "as the reference implementation pruned it"}


def _embed(weights: dict[str, Tensor], dense: nn.Module, path: str | os.PathLike) -> dict[str, Tensor]:
    """Write a file's weights into the dense network, zeros elsewhere; return the kept channels of every BatchNorm."""
    own = dense.state_dict()
    chosen = {k[: -len(SELECT)]: w.bool() for k, w in weights.items() if k.endswith(SELECT)}
    if odd := [k for k, w in chosen.items() if w.ndim != 1]:
        raise CheckpointError(f"{path} is malformed: {odd[0]}{SELECT} is no list of channels")
    expected = {k for k in own if not k.endswith("num_batches_tracked")}  # which older torch did not have
    found = {k for k in weights if not k.endswith(("num_batches_tracked", SELECT))}
    if odd := sorted(expected ^ found):
        where = "lacks" if odd[0] in expected else "also has"
        raise CheckpointError(f"{path} is of another network than model=...: it {where} {odd[0]}")
    kept: dict[str, Tensor] = {}
    for name, module in dense.named_modules():
        for key in (k for k, v in (*module._parameters.items(), *module._buffers.items()) if v is not None):
            target, value = own[f"{name}.{key}"], weights.get(f"{name}.{key}")
            if value is None or (value.ndim == 0 and target.ndim == 0):
                continue
            axes = _positions(name, module, value, chosen)
            if not _fits(value, axes, target):
                raise CheckpointError(
                    f"{path} is of another network than model=...: {name}.{key} is {tuple(value.shape)} there, "
                    f"{tuple(target.shape)} in the dense network (DenseNet: model.init_channels=24)"
                )
            target.fill_(1 if key == "running_var" else 0)
            target[np.ix_(*axes)] = value.to(target.dtype)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            stays = chosen.get(_block(name)) if name.rpartition(".")[2] in ("bn1", "bn") else None
            if stays is None:
                stays = torch.arange(module.num_features) < len(weights[f"{name}.weight"])
            if len(stays) != module.num_features:
                raise CheckpointError(f"{path} is malformed: {_block(name)}{SELECT} does not match {name}")
            kept[name] = stays
            module.weight.data[~stays] = 0
            module.bias.data[~stays] = 0
    return kept


def _positions(name: str, module: nn.Module, value: Tensor, chosen: dict[str, Tensor]) -> list[np.ndarray]:
    """Return where along each axis of the dense tensor a file's tensor belongs."""
    axes = [np.arange(n) for n in value.shape]
    reader = name.rpartition(".")[2] in ("conv1", "fc") and not (name == "conv1" and value.ndim == 4)
    if value.ndim > 1 and reader and _block(name) in chosen:
        axes[1] = chosen[_block(name)].nonzero().flatten().numpy()
    return axes


def _fits(value: Tensor, axes: list[np.ndarray], target: Tensor) -> bool:
    """Return whether a file's tensor has a position for every number, along every axis of the dense tensor."""
    return value.ndim == target.ndim and all(
        len(axis) == size and size > 0 and int(axis.max()) < n
        for axis, size, n in zip(axes, value.shape, target.shape, strict=True)
    )


def _block(name: str) -> str:
    """Return `layer1.0.` of `layer1.0.conv1`, "" of `fc`."""
    return name[: name.rfind(".") + 1]
