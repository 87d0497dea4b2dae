"""The one file format: a Lightning checkpoint with a "slimming" record (records.Record), read as data (`weights_only=True`)."""

import contextlib
import copy
import errno
import os
import pickle
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimming.channels.low_rank import low_rank_like
from slimming.channels.plan import PruningPlan
from slimming.channels.surgery import prune
from slimming.errors import CheckpointError, SlimmingError
from slimming.files import replacing
from slimming.records import RECORD_FORMAT, Record
from slimming.untrusted import Draft, check_amount, check_plain, check_record, check_tensors

PREFIX = "model."  # of the network's weights in a LightningModule's state dict


@dataclass
class Checkpoint:
    """A checkpoint that was read: its record, and the whole content of the file."""

    path: Path
    record: Record
    content: dict[str, Any]


def write(content: dict, path: str | os.PathLike) -> None:
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


def write_network(model: nn.Module, record: Record, path: str | os.PathLike) -> None:
    """Write a network and its record as a checkpoint without any training state; errors as `write`."""
    state = {PREFIX + key: value for key, value in model.state_dict().items()}
    training = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": version("lightning"),
    }  # Lightning looks for it
    write({"state_dict": state, "slimming": record.to_dict()} | training, path)


def save(
    path: str | os.PathLike,
    model: nn.Module,
    *,
    plans: Sequence[PruningPlan] = (),
    dense: dict[str, Any] | None = None,
    low_rank: dict[str, Any] | None = None,
) -> None:
    """Write a network so that `load` rebuilds it; for trainings in code of one's own.

    Args:
        path: of the checkpoint.
        model: the network, dense or pruned.
        plans: the pruning plans that led to it, in order.
        dense: {name, arguments} of the dense network in `slimming.models`; None: `load` takes `model=`, the dense network.
        low_rank: the splits of layers, made after the last plan.

    Raises:
        CheckpointError: the disk is full or not writable; or `dense` and `plans` do not lead to this network.
        ConfigError: there is no such network.
    """
    record = Record(model=dense, plans=[plan.to_dict() for plan in plans], low_rank=low_rank)
    state = {PREFIX + key: value for key, value in model.state_dict().items()}
    check_record(record.to_dict(), path)
    if dense is not None:
        _check_outline(record, _weights({"state_dict": state}, path), path)
    write_network(model, record, path)


def read(path: str | os.PathLike) -> Checkpoint:
    """Read a checkpoint of ours onto the CPU.

    Raises:
        CheckpointError: missing, truncated, foreign, of a newer format, or holding code (which is not run).
    """
    return checked(read_data(path), path)


def checked(content: Any, path: str | os.PathLike) -> Checkpoint:
    """Return what was read from a file as a checkpoint, once its record is known to be one; errors as `read`."""
    record = content.get("slimming") if isinstance(content, dict) else None
    if not isinstance(record, dict) or not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(f"{path} was not written by slimming: it has no 'slimming' record")
    check_plain(record, path)
    if record.get("format") != RECORD_FORMAT:
        raise CheckpointError(f"{path} has format {record.get('format')!r}, this version reads format {RECORD_FORMAT}")
    check_record(record, path)
    return Checkpoint(Path(path), Record.from_dict(record), content)


def read_data(path: str | os.PathLike) -> Any:
    """Read any file of torch.save onto the CPU that holds tensors and plain data alone; errors as `read`."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a checkpoint of ours: it is damaged or holds objects other than tensors and plain data, "
            "which are not loaded because they could run code"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # a truncated archive raises many things
        hint = "" if zipfile.is_zipfile(path) else " (truncated, or not a checkpoint)"
        raise CheckpointError(f"{path} cannot be read{hint}: {' '.join(str(error).split())[:200]}") from error


def _check_archive(path: Path) -> None:
    """Raise CheckpointError if an archive unpacks to more than it is; torch.save compresses nothing."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise CheckpointError(f"{path} was not written by torch.save: it unpacks to more than its own size")


def load(path: str | os.PathLike, model: nn.Module | None = None) -> nn.Module:
    """Rebuild the network of a checkpoint, in eval mode on the CPU.

    Args:
        path: a checkpoint of any stage.
        model: the dense network, for one that is not registered in `slimming.models`; a copy of it is pruned and filled.

    Raises:
        CheckpointError: as `read`; or the checkpoint does not name a registered model and none is given, or the weights
            belong to another architecture.
        ConfigError: it names a network that there is not.
        PlanError: a plan in it is not valid, or not for that network.
    """
    return rebuild(read(path), model)


def rebuild(saved: Checkpoint, model: nn.Module | None = None) -> nn.Module:
    """Do what `load` does with a checkpoint that was read already."""
    thin = architecture(saved, model)
    weights = load_weights(thin, saved)
    if floats := [w.dtype for w in weights.values() if w.is_floating_point()]:
        thin.to(floats[0])
        thin.load_state_dict(weights)  # again, where the first time rounded
    return thin.eval()


def architecture(saved: Checkpoint, model: nn.Module | None = None, *, pruned: bool = True) -> nn.Module:
    """Build the network that a checkpoint describes; its weights are slices (see `models.redraw`).

    Without `model` it is first built without numbers, its plans applied, and compared with the weights in the file. Only
    then is it built for real: by its own constructor rather than by filling the outline, so that buffers that are in no
    file, and constants, are what the constructor makes them.

    Args:
        pruned: apply the plans, and split what was split.
    """
    weights = _weights(saved.content, saved.path)
    if model is None:
        _check_outline(saved.record, weights, saved.path)
        with _as_checkpoint_errors(saved.path):
            model = _build(saved.record, Draft(weights, saved.path, real=True), saved.path)
    else:
        model = copy.deepcopy(model)
    with _as_checkpoint_errors(saved.path):
        return _pruned(model, saved.record) if pruned else model


def _check_outline(record: Record, weights: dict[str, torch.Tensor], path: str | os.PathLike) -> None:
    """Raise a SlimmingError unless the network of a record, its plans applied, has the shapes of the weights.

    The few networks whose constructors compute with their weights have no outline; Draft bounds what building them takes.
    """
    try:
        outline = _build(record, Draft(weights, path, real=False), path)
    except SlimmingError:
        raise
    except Exception:
        return
    with _as_checkpoint_errors(path):
        outline = _pruned(outline, record)
    _compare(outline, weights, record, path)
    check_amount(outline, weights, path)


def _build(record: Record, draft: Draft, path: str | os.PathLike) -> nn.Module:
    """Build the dense network of a record; pretrained weights that it names are neither opened nor fetched."""
    from slimming import models

    if not record.model:
        raise CheckpointError(
            f"{path} holds a network that is not registered in slimming.models: load(path, model=...), "
            "or model._target_=<class> on the command line"
        )
    spec = models.spec(record.model["name"], record.model["arguments"])
    arguments = spec["arguments"]
    if "weights" in arguments:
        arguments = arguments | {"weights": None}
    with draft:
        return models.build(spec["name"], **arguments)


def _pruned(model: nn.Module, record: Record) -> nn.Module:
    for plan in record.plans:
        model = prune(model, PruningPlan.from_dict(plan), verify=False)
    return low_rank_like(model, record.low_rank) if record.low_rank else model


@contextlib.contextmanager
def _as_checkpoint_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turn whatever a network or its surgery objects to in a file's values into one clear error."""
    try:
        yield
    except SlimmingError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: no network is as it describes ({type(error).__name__}: {reason})") from error


def load_weights(model: nn.Module, saved: Checkpoint) -> dict[str, torch.Tensor]:
    """Copy the weights of a checkpoint into `model`; return them.

    Raises:
        CheckpointError: of another architecture; names the first difference.
    """
    weights = _weights(saved.content, saved.path)
    _compare(model, weights, saved.record, saved.path)
    model.load_state_dict(weights)
    return weights


def _weights(content: dict, path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Return the network's weights among those of a LightningModule."""
    state = {k: v for k, v in content["state_dict"].items() if str(k).startswith(PREFIX)}
    check_tensors(state, path)
    return {k.removeprefix(PREFIX): v for k, v in state.items()}


def _compare(model: nn.Module, weights: dict[str, torch.Tensor], record: Record, path: str | os.PathLike) -> None:
    own = model.state_dict()
    for key in [*own, *weights]:
        here, there = (tuple(d[key].shape) if key in d else "nothing" for d in (own, weights))
        if here != there:
            raise CheckpointError(
                f"{path} holds another architecture ({describe(record)}): "
                f"{key} is {there} there and {here} in this network"
            )


def describe(record: Record) -> str:
    """Name the network of a record: `vgg(depth=19, width=0.25, ...)`."""
    spec = record.model or {"name": "unregistered", "arguments": {}}
    return f"{spec['name']}({', '.join(f'{k}={v}' for k, v in spec['arguments'].items())[:300]})"
