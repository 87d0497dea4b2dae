"""The whole pipeline: the stages called in turn, each in a folder of its own, then the report."""

import dataclasses
import math
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimming.config import (
    DistillConfig,
    FinetuneConfig,
    PruneConfig,
    PruneOptions,
    ReportConfig,
    SlimConfig,
    TrainConfig,
    plain,
    ratios,
    tag,
)
from slimming.errors import RunDirectoryError, check_patterns
from slimming.folders import LOCK, claimed
from slimming.records import config_differences, finished
from slimming.stages.building import build, model_spec
from slimming.stages.finetuning import finetune, fit_schedule
from slimming.stages.latency_budget import check as check_latency
from slimming.stages.precision import settled
from slimming.stages.pruning import PRUNED, SILENT, prune
from slimming.stages.reporting import report
from slimming.stages.resuming import LAST
from slimming.stages.running import run_on_devices
from slimming.stages.tasks import TASKS, task_of
from slimming.stages.training import train


def slim(cfg: SlimConfig, out: Path) -> float:
    """Train sparsely, prune, fine-tune, report; what is there and finished is kept, what was begun goes on.

    `out` then holds baseline/ (if asked), sparse/, <ratio>/pruned/, <ratio>/finetuned/ (and scratch/) with the files of
    each stage, the same again in pass-2/ ... where there are several passes, and the report.

    Returns:
        The test accuracy (of a detector mAP@0.5) of the last fine-tuned network, in [0, 1].

    Raises:
        SlimmingError: of the stages; or `out` holds a stage of another configuration.
    """
    _check_ignored(cfg)
    if cfg.budget.latency is not None:
        check_latency(cfg)
    with claimed(out):
        return _slim(cfg, out)


def _check_ignored(cfg: SlimConfig) -> None:
    """Raise ConfigError if a pattern to ignore matches no BatchNorm: now, not after the sparse training."""
    if not cfg.ignore:
        return
    fresh = {"weights": None} if "weights" in cfg.model else {}
    try:
        with torch.device("meta"):  # names are all that is needed; they do not depend on the data
            model = build("model", cfg.model | fresh, num_classes=10, in_channels=3)
    except Exception:  # a constructor that computes with its weights; pruning will check the patterns
        return
    names = (name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    check_patterns("ignore", cfg.ignore, names, "BatchNorm")


def _slim(cfg: SlimConfig, out: Path) -> float:
    begun = (out / name / LAST for name in ("baseline", "sparse"))
    cfg = dataclasses.replace(cfg, trainer=settled(cfg.trainer, *begun))  # one precision for all stages
    recipe = {f.name: getattr(cfg, f.name) for f in fields(TrainConfig)}
    if cfg.baseline:
        _stage(train, TrainConfig(**recipe | {"sparsity": 0.0, "target_ratio": None, "shrink": None}), out / "baseline")
    accuracy, before = math.nan, None
    for number in range(1, cfg.passes + 1):
        folder = out if number == 1 else out / f"pass-{number}"
        if before is None:
            _stage(train, TrainConfig(**recipe), folder / "sparse")
        else:
            again = {
                "sparsity": cfg.sparsity,
                "target_ratio": cfg.target_ratio,
                "penalty": cfg.penalty,
                "shrink": cfg.shrink,
                "seed": cfg.seed,
            }
            _stage(finetune, _tuning(cfg, before, **again), folder / "sparse")
        for ratio in ratios(cfg):
            accuracy, before = _thin(cfg, folder, ratio)
    report(ReportConfig(runs=str(out)))
    return accuracy


def _thin(cfg: SlimConfig, folder: Path, ratio: float | None) -> tuple[float, Path]:
    """Prune and fine-tune folder/sparse at one ratio; return the accuracy and the checkpoint that is left."""
    sparse, thinned = folder / "sparse" / LAST, folder / _name(cfg, ratio)
    options = {f.name: getattr(cfg, f.name) for f in fields(PruneOptions)}
    pruning = PruneConfig(**options | {"ratio": ratio}, checkpoint=str(sparse), seed=cfg.seed, trainer=_one_device(cfg))
    pruning.model, pruning.data, pruning.logger = _unregistered_model(cfg), cfg.data, cfg.logger
    _stage(prune, pruning, thinned / "pruned")
    thin = thinned / "pruned" / PRUNED
    length = {"max_epochs": cfg.finetune.max_epochs} if cfg.finetune.max_epochs else {}
    rate = {"lr": cfg.finetune.lr} if cfg.finetune.lr else {}
    teacher = DistillConfig(teacher=str(sparse) if cfg.finetune.distill else None)
    tuning = _tuning(cfg, thin, trainer=length, optimizer=rate, distill=teacher)
    accuracy = _stage(finetune, tuning, thinned / "finetuned")
    if cfg.finetune.scratch:
        _stage(finetune, _tuning(cfg, thin, init="scratch"), thinned / "scratch")
    return accuracy, thinned / "finetuned" / LAST


def _one_device(cfg: SlimConfig) -> dict[str, Any]:
    """Return the values of a Trainer for pruning: one device, without what belongs to training."""
    devices = cfg.trainer.get("devices")
    kept = {k: cfg.trainer.get(k) for k in ("accelerator", "limit_test_batches", "limit_val_batches")}
    one = devices[:1] if isinstance(devices, list) else 1
    return {"_target_": "lightning.pytorch.Trainer", "devices": one, "precision": None} | SILENT | kept


def _tuning(cfg: SlimConfig, path: Path, **more) -> FinetuneConfig:
    """Describe a fine-tuning; classes that a checkpoint may not name by itself are taken from the command line."""
    same = {k: getattr(cfg, k) for k in ("compile", "sync_batchnorm", "logger", "callbacks")}
    same |= {"model": _unregistered_model(cfg), "data": cfg.data}
    for group in ("optimizer", "scheduler"):
        given = more.get(group) or {}
        same[group] = getattr(cfg, group) | given
    same["trainer"] = cfg.trainer | (more.get("trainer") or {})
    same["scheduler"] = fit_schedule(same["scheduler"], cfg.trainer["max_epochs"], same["trainer"]["max_epochs"])
    return FinetuneConfig(checkpoint=str(path), **{"shrink": None} | more | same)


def _unregistered_model(cfg: SlimConfig) -> dict:
    """Return the model's group where it is not a registered one, which checkpoints rebuild by themselves."""
    return {} if model_spec(cfg.model, {}) else cfg.model


def _name(cfg: SlimConfig, ratio: float | None) -> str:
    """Name a pruning's folder: `ratio-0.7`, `macs-0.5`, `optimal`."""
    parts = [("ratio", ratio), ("threshold", cfg.threshold), *vars(cfg.budget).items()]
    return "".join(tag(*part) for part in parts)[1:] or str(cfg.criterion)


def _stage(stage: Callable[[Any, Path], float], cfg: Any, folder: Path) -> float:
    """Run a stage unless it is finished there; go on with one that was interrupted.

    Raises:
        RunDirectoryError: the folder holds the stage with another configuration.
    """
    done = finished(folder)
    if done:
        if differences := config_differences(done.get("asked", done["config"]), plain(cfg)):
            raise RunDirectoryError(
                f"{folder} holds a finished run of another configuration: {differences}. "
                "Give the same values to go on, or another hydra.run.dir"
            )
        print(f"{folder}: finished already, kept")
        task = TASKS[done.get("task") or task_of(done["config"]).name]
        return done["metrics"].get(f"test/{task.score}", math.nan)
    print(f"\n=== {folder}")
    if stage is prune:
        with claimed(folder):
            _clear(folder)  # the leftovers of an interrupted pruning
            return prune(cfg, folder)
    return run_on_devices(stage.__name__, dataclasses.replace(cfg, resume=(folder / LAST).exists()), folder)


def _clear(folder: Path) -> None:
    """Empty a folder that is claimed."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != LOCK:
            entry.unlink()
