"""Going on with a thinner network in the middle of a training."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn

from slimming import checkpoint
from slimming.channels.plan import PruningPlan
from slimming.checkpoint import Checkpoint
from slimming.config import TrainConfig
from slimming.errors import ConfigError
from slimming.records import Record
from slimming.training.shrinking import Leaving, shrinks


def leaving(cfg: TrainConfig, model: nn.Module, record: Record, example: torch.Tensor) -> Leaving | None:
    """Return what lets channels go between two fits; None where that is not asked for.

    Raises:
        ConfigError: the network, or its record, does not allow it.
    """
    if not cfg.shrink:
        return None
    for key in ("min_epochs", "min_steps"):  # of the recipe that a checkpoint hands on as well
        if cfg.trainer.get(key):
            raise ConfigError(
                f"shrink=true and trainer.{key} exclude each other: shrinking ends one fit and begins another; give "
                f"trainer.{key}=null"
            )
    if record.low_rank:
        raise ConfigError(
            "shrink=true: the network's layers are split into factors of low rank, which keep their channels"
        )
    asked = cfg.shrink
    found = Leaving(example, cfg.penalty.layers, cfg.decay_batchnorm, asked.threshold, asked.epochs, asked.round_to)
    found.check(model)
    return found


def check_callbacks(trainer: pl.Trainer) -> None:
    """Raise ConfigError if a callback keeps another copy of the weights, which would stay wide."""
    for callback in trainer.callbacks:
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise ConfigError(
                f"shrink=true and the callback {type(callback).__name__} exclude each other: the weights that it averages "
                "would keep their width"
            )


def plans_since(record: Record, saved: Checkpoint) -> list[PruningPlan]:
    """Return the plans by which channels have left, in a training that began with a record and has left a last.ckpt."""
    return [PruningPlan.from_dict(plan) for plan in saved.record.plans[len(record.plans) :]]


def go_on(trainer: pl.Trainer, left: Leaving, path: Path, model: nn.Module) -> Checkpoint:
    """Let channels go from last.ckpt, on the first rank; return the file as all ranks then find it.

    Args:
        model: as wide as the file's; its weights are overwritten on the first rank.
    """
    if trainer.is_global_zero:
        left.let_go(path, model)
    trainer.strategy.barrier()
    return checkpoint.read(path)


def history(record: Record) -> list[dict[str, Any]]:
    """Say when channels left: {epoch, gammas that went by choice, and as nothing needed them; shares that remained of the
    MACs and parameters that the training began with}."""
    found: list[dict[str, Any]] = []
    macs = params = 1.0
    for plan in shrinks(record.plans):
        got = plan["got"]
        macs, params = macs * got["macs"], params * got["params"]
        counts = {"removed": got["removed"], "dead": got["dead"], "candidates": got["candidates"]}
        found.append({"epoch": plan["asked"]["epoch"]} | counts | {"macs": macs, "params": params})
    return found
