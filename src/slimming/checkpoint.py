"""The one file format: a Lightning checkpoint with a "slimming" record, read as data (`weights_only=True`).

The record: {format, model: {name, arguments} or None, plans, data: statistics, stage, metrics, config: of the training}.
All of it is plain data; the model is a name in `slimming.models` with plain arguments, the plans are those that led from
it to this network, in order.
"""

import copy
import errno
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimming.channels.plan import PruningPlan
from slimming.channels.surgery import prune
from slimming.errors import CheckpointError
from slimming.files import replacing

FORMAT = 1
PREFIX = "model."  # of the network's weights in a LightningModule's state dict


def save(content: dict, path: str | os.PathLike) -> None:
    """Write `content` whole or not at all: under a temporary name in the same folder, synchronised, then renamed.

    Raises:
        CheckpointError: the disk is full or not writable; a file that was at `path` is still there, unharmed.
    """
    path = Path(path)
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch's zip writer wraps an OSError into a RuntimeError
        full = getattr(error, "errno", None) == errno.ENOSPC
        kept = f"the last good {path.name} is still there" if path.exists() else "nothing was left behind"
        reason = "the disk is full" if full else " ".join(str(error).split())
        raise CheckpointError(f"{path} cannot be written ({reason}): make room and resume; {kept}") from error


def read(path: str | os.PathLike) -> dict:
    """Read a checkpoint of ours onto the CPU.

    Raises:
        CheckpointError: missing, truncated, foreign, of a newer format, or holding code (which is not run).
    """
    content = read_data(path)
    record = content.get("slimming") if isinstance(content, dict) else None
    if not isinstance(record, dict) or not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(f"{path} was not written by slimming: it has no 'slimming' record")
    if record.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {record.get('format')!r}, this version reads format {FORMAT}")
    return content


def read_data(path: str | os.PathLike) -> Any:
    """Read any file of torch.save onto the CPU that holds tensors and plain data alone; errors as `read`."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a checkpoint of ours: it is damaged or holds objects other than tensors and plain data, "
            "which are not loaded because they could run code"
        ) from error
    except Exception as error:  # a truncated archive raises many things
        hint = "" if zipfile.is_zipfile(path) else " (truncated, or not a checkpoint)"
        raise CheckpointError(f"{path} cannot be read{hint}: {' '.join(str(error).split())[:200]}") from error


def load(path: str | os.PathLike, model: nn.Module | None = None) -> nn.Module:
    """Rebuild the network of a checkpoint, in eval mode on the CPU.

    Args:
        path: a checkpoint of any stage.
        model: the dense network, for one that is not registered in `slimming.models`; a copy of it is pruned and filled.

    Raises:
        CheckpointError: as `read`; or the checkpoint does not name a registered model and none is given, or the weights
            belong to another architecture.
    """
    return rebuild(read(path), path, model)


def rebuild(content: dict, path: str | os.PathLike, model: nn.Module | None = None) -> nn.Module:
    """Do what `load` does with the content of a checkpoint that was read already."""
    thin = architecture(content["slimming"], path, model)
    weights = load_weights(thin, content, path)
    if floats := [w.dtype for w in weights.values() if w.is_floating_point()]:
        thin.to(floats[0])
        thin.load_state_dict(weights)  # again, where the first time rounded
    return thin.eval()


def architecture(record: dict, path: str | os.PathLike, model: nn.Module | None = None) -> nn.Module:
    """Build the network that a record describes, its plans applied, with fresh weights (or sliced ones of `model`)."""
    if model is None:
        from slimming import models

        spec = record.get("model")
        if not spec:
            raise CheckpointError(
                f"{path} holds a network that is not registered in slimming.models: load(path, model=...), "
                "or model._target_=<class> on the command line"
            )
        model = models.build(spec["name"], **spec["arguments"])
    else:
        model = copy.deepcopy(model)
    for plan in record["plans"]:
        model = prune(model, PruningPlan.from_dict(plan), verify=False)
    return model


def load_weights(model: nn.Module, content: dict, path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Copy the weights of a checkpoint's content into `model`; return them.

    Raises:
        CheckpointError: of another architecture; names the first difference.
    """
    weights = {k.removeprefix(PREFIX): v for k, v in content["state_dict"].items() if k.startswith(PREFIX)}
    own = model.state_dict()
    for key in [*own, *weights]:
        here, there = (tuple(d[key].shape) if key in d else "nothing" for d in (own, weights))
        if here != there:
            kind = describe(content["slimming"])
            raise CheckpointError(
                f"{path} holds another architecture ({kind}): {key} is {there} there and {here} in this network"
            )
    model.load_state_dict(weights)
    return weights


def describe(record: dict) -> str:
    """Name the network of a record: `vgg(depth=19, width=0.25, ...)`."""
    spec = record.get("model") or {"name": "unregistered", "arguments": {}}
    return f"{spec['name']}({', '.join(f'{k}={v}' for k, v in spec['arguments'].items())})"
