"""What the stages share: building from configuration, data loaded once, the record of a run, evaluation."""

import contextlib
import functools
import json
import logging
import os
import platform
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import torch
from hydra.errors import InstantiationException
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from slimming import data as datasets
from slimming import models
from slimming.channels.cost import Cost, cost
from slimming.data import ImageData
from slimming.errors import CheckpointError, ConfigError, RunDirectoryError, SlimmingError
from slimming.files import write_text
from slimming.folders import claimed
from slimming.training.module import SlimmingModule

RESULT = "result.json"


# --- building from configuration --------------------------------------------------------------------------------------


def build(key: str, node: dict, **more) -> Any:
    """Instantiate a config group; whatever its constructor objects to becomes a ConfigError that names the group."""
    if not node.get("_target_"):
        raise ConfigError(f"{key} has no _target_: choose one of configs/{key}/, got {node}")
    try:
        return hydra.utils.instantiate(node, _convert_="all", **more)
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, SlimmingError):
            raise cause from None
        raise ConfigError(f"{key}: {' '.join(str(cause).split())}") from error
    except Exception as error:
        raise ConfigError(f"{key}: {' '.join(str(error).split())}") from error


def build_data(node: dict) -> ImageData:
    """Build a data module; the same description gives the same one again, so that a sweep loads its data once."""
    return _last_data(json.dumps(node, sort_keys=True))


@functools.lru_cache(maxsize=1)
def _last_data(description: str) -> ImageData:
    return build("data", json.loads(description))


def model_spec(node: dict, heads: dict[str, int]) -> dict | None:
    """Return {name, arguments} of a registered model, None for another class."""
    name = node["_target_"].removeprefix("slimming.models.")
    if name not in models.REGISTRY:
        return None
    return models.spec(name, {k: v for k, v in node.items() if not k.startswith("_")} | heads)


def model_label(spec: dict | None, model: nn.Module) -> str:
    return models.label(**spec) if spec else type(model).__name__


def data_label(node: dict) -> str | None:
    """Name a data set by its class: `cifar10`, `imagefolder`."""
    target = node.get("_target_")
    return target and target.rpartition(".")[2].lower()


def try_model(model: nn.Module, example: torch.Tensor) -> Cost:
    """Count what the network costs on an example, in the network's precision; ConfigError if it cannot process one."""
    try:
        return cost(model, example.to(dtype_of(model)))
    except Exception as error:
        shape = "x".join(map(str, example.shape[1:]))
        raise ConfigError(
            f"the network cannot process images of {shape}: {' '.join(str(error).split())[:200]}; "
            "set data.image_size where the data set has it, or choose another model"
        ) from error


def uncounted(cost: dict) -> str:
    """Say what a cost in result.json leaves out: ` (not counted: cdist in head)`, "" if nothing."""
    return f" (not counted: {', '.join(cost['uncounted'])})" if cost.get("uncounted") else ""


def dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def example_of(data: ImageData) -> torch.Tensor:
    return torch.zeros(1, data.in_channels, data.image_size, data.image_size)


def inherit(group: str, given: dict, recorded: dict | None) -> dict:
    """Return a checkpoint's group with the values that are given now (not None); a given `_target_` replaces it whole.

    Raises:
        CheckpointError: the checkpoint names a class that is not one of the known ones: a file is data, and what it names
            is not run.
    """
    if given.get("_target_") or not recorded:
        return given
    if not _is_known(group, recorded):
        raise CheckpointError(
            f"the checkpoint's {group} is {str(recorded)[:200]}, which is not built on a file's word alone: "
            f"give {group}=<name> or {group}._target_=<class> (with its values) on the command line"
        )
    return recorded | {k: v for k, v in given.items() if v is not None}


def _is_known(group: str, node: dict) -> bool:
    """Return whether a recorded group is a class of torch's, Lightning's or ours with plain values."""

    def plain(value) -> bool:
        if isinstance(value, dict):
            return all(isinstance(k, str) and not k.startswith("_") and plain(v) for k, v in value.items())
        if isinstance(value, list | tuple):
            return all(map(plain, value))
        return not (isinstance(value, str) and "${" in value)  # OmegaConf would resolve it, with any resolver

    target = str(node.get("_target_"))
    module, _, name = target.rpartition(".")
    known = {
        "data": module == "slimming.data" and name in datasets.__all__,
        "optimizer": module == "torch.optim" and _is_class(torch.optim, name, torch.optim.Optimizer),
        "scheduler": target == "slimming.training.schedules.multistep"
        or (
            module == "torch.optim.lr_scheduler"
            and _is_class(torch.optim.lr_scheduler, name, torch.optim.lr_scheduler.LRScheduler)
        ),
        "trainer": target == "lightning.pytorch.Trainer",
    }
    return known[group] and plain({k: v for k, v in node.items() if k not in ("_target_", "_partial_")})


def _is_class(module, name: str, base: type) -> bool:
    found = getattr(module, name, None)
    return isinstance(found, type) and issubclass(found, base)


# --- evaluation -------------------------------------------------------------------------------------------------------


def accuracies(trainer: pl.Trainer, model: nn.Module, data: ImageData) -> tuple[dict[str, float], int]:
    """Return test/acc and, where there is a validation split, val/acc, each in [0, 1]; and how many images were tested."""
    module = SlimmingModule(model, data.num_classes, optimizer=None)
    found: dict[str, float] = {}
    for results in (
        trainer.test(module, datamodule=data, verbose=False),
        trainer.validate(module, datamodule=data, verbose=False) if "val" in data.splits else [],
    ):
        found |= results[0] if results else {}
    metrics = {key: float(value) for key, value in found.items() if key.endswith("/acc")}
    return metrics, module.evaluated.get("test", 0)


def weight_bytes(model: nn.Module) -> int:
    """Count the bytes of all parameters and buffers that a checkpoint holds."""
    return sum(v.numel() * v.element_size() for v in model.state_dict().values())


# --- the record of a run ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def recorded(out: Path, result: dict) -> Iterator[dict]:
    """Hold the run directory and write result.json in the end, of a stage that fails as well.

    Args:
        result: what is known from the start; the caller adds the rest to the dict that it gets.

    Raises:
        RunDirectoryError: the directory is another run's, whose record stays as it is.
    """
    result = {"format": 1, "status": "failed", "error": None} | result | {"versions": versions()}
    started = time.monotonic()
    with claimed(out):
        _refuse_other(result["stage"], out)
        try:
            with quiet():
                yield result
        except RunDirectoryError:  # what is recorded there is another run's
            raise
        except BaseException as error:
            with contextlib.suppress(OSError):  # the failure itself is what must be told
                _leave(out, result | {"error": cause(error)}, started)
            raise
        _leave(out, result | {"status": "finished"}, started)


def _refuse_other(stage: str, out: Path) -> None:
    done = finished(out)
    if done and done.get("stage") != stage:
        raise RunDirectoryError(f"{out} holds a finished run of {done.get('stage')}: give another hydra.run.dir")


def _leave(out: Path, result: dict, started: float) -> None:
    # Else another rank writes it, or the finished run that is there is not this one.
    if rank_zero() and not (result["error"] and finished(out)):
        result["wall_time_s"] = time.monotonic() - started
        write_text(out / RESULT, json.dumps(result, indent=1))


def cause(error: BaseException) -> str:
    """Say in one line what ended a run."""
    if isinstance(error, SystemExit | KeyboardInterrupt):  # Lightning turns Ctrl-C into the first
        return "interrupted"
    return str(error) if isinstance(error, SlimmingError) else f"{type(error).__name__}: {error}"


def rank_zero() -> bool:
    """Return whether this process is the one that writes files and talks."""
    return getattr(rank_zero_only, "rank", 0) in (0, None)


def record_failure(out: Path, stage: str, message: str) -> None:
    """Write the cause of a failure into result.json, over what a rank took for it; a finished run's record stays."""
    if finished(out):
        return
    result: dict = {"format": 1, "stage": stage}
    with contextlib.suppress(OSError, ValueError):
        result = json.loads((out / RESULT).read_text())
    with contextlib.suppress(OSError):  # the failure itself is what must be told
        write_text(out / RESULT, json.dumps(result | {"status": "failed", "error": message}, indent=1))


def finished(out: Path) -> dict | None:
    """Return the record of a run that is there and complete, else None."""
    with contextlib.suppress(OSError, ValueError):
        result = json.loads((out / RESULT).read_text())
        return result if result["status"] == "finished" else None
    return None


def relative(path: str | None, out: Path) -> str | None:
    """Return a path as seen from the run directory, so that the record stays true when a tree of runs is moved."""
    return path and os.path.relpath(path, out)


def versions() -> dict[str, str]:
    names = ("slimming", "torch", "torchvision", "lightning")
    return {n: version(n) for n in names} | {"python": platform.python_version(), "machine": _machine()}


def _machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


@contextlib.contextmanager
def quiet():
    """Keep Lightning's notes on itself and on settings that are meant so off the screen."""
    logs = [logging.getLogger(n) for n in ("lightning.pytorch", "lightning.fabric", "lightning", "matplotlib")]
    levels = [log.level for log in logs]
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",  # batches come from memory
            ".*isinstance.treespec, LeafSpec.*",
            ".*LightningModule.*checkpoint.*",
            "Checkpoint directory .* exists.*",
            ".*logging interval.*",
            ".*lr_scheduler.step.*before.*optimizer.step.*",  # GradScaler skipped the first step
        ):
            warnings.filterwarnings("ignore", message)
        for log in logs:
            log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for log, level in zip(logs, levels, strict=True):
                log.setLevel(level)
