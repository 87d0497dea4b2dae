"""The training of a network, new or thin: what `train` and `finetune` have in common."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from slimming import checkpoint
from slimming.channels.cost import Cost, widths
from slimming.channels.layers import synchronise
from slimming.channels.penalty import max_shrinkage, near_zero_share, other_norms
from slimming.checkpoint import Checkpoint
from slimming.config import TrainConfig
from slimming.data import ImageData
from slimming.errors import CheckpointError, ConfigError, RunDirectoryError
from slimming.ranks import torchrun_devices
from slimming.records import Record, config_differences
from slimming.report import figures
from slimming.stages import precision
from slimming.stages.building import build, data_label, example_of, model_label, try_model
from slimming.stages.measuring import uncounted, weight_bytes
from slimming.stages.recording import Run, rank_zero
from slimming.training.distillation import DistillingModule
from slimming.training.module import SlimmingModule
from slimming.training.progress import EpochLines
from slimming.training.recorder import BINS, AtomicCheckpointIO, Recorder
from slimming.training.schedules import lr_per_epoch, sgd_momentum

LAST = "last.ckpt"
PROGRESS = {"epoch": int, "global_step": int, "loops": dict, "optimizer_states": list, "lr_schedulers": list}

Say = Callable[..., None]  # prints on the first rank


@dataclass
class Network:
    """A network on its way into a training.

    Attributes:
        record: what its checkpoints say of it.
        optimizer_state: to begin with.
        teacher: None, or a network to learn from.
        distillation: temperature and alpha, where there is a teacher.
    """

    model: nn.Module
    record: Record
    optimizer_state: dict | None = None
    teacher: nn.Module | None = None
    distillation: dict[str, float] | None = None


@dataclass
class Rates:
    """What is known of an optimizer before it runs: its learning rate in every epoch, and SGD's momentum (else None)."""

    per_epoch: list[float]
    momentum: float | None


def fit(cfg: TrainConfig, run: Run, network: Network, data: ImageData, start: Checkpoint | None) -> None:
    """Train a network; add to `run.result` what comes of it.

    Args:
        start: last.ckpt of the run directory to resume from, None to begin.
    """
    out, result = run.out, run.result
    if cfg.trainer.get("sync_batchnorm"):
        raise ConfigError(
            "trainer.sync_batchnorm would forget the indices of pruned BatchNorms: set sync_batchnorm=true"
        )
    costs = try_model(network.model, example_of(data))
    if cfg.channels_last:
        network.model.to(memory_format=torch.channels_last)
    factories = {k: build(k, getattr(cfg, k), _partial_=True) for k in ("optimizer", "scheduler")}
    rates = _rates(factories, cfg.trainer["max_epochs"])
    module = _module(cfg, network, data.num_classes, factories)
    recorder = Recorder(out)
    trainer = _trainer(cfg, run, recorder)
    if start:
        precision.check_kept(trainer, cfg.trainer.get("precision"))
    _connect_ranks_and_load(trainer, data)
    if start:
        _check_data(start.record.data, data, out)
    if cfg.sync_batchnorm:
        module.model = _synchronised(network.model, trainer)
    result.model, result.data = model_label(network.record.model, network.model), data_label(cfg.data)
    trainer.print(f"{result.model} on {type(data).__name__}: {_size(costs)}\n  run directory: {out}")
    _announce(cfg, trainer, module, rates, data)
    _announce_start(trainer.print, cfg, trainer, start)
    if cfg.compile:
        module.model.compile()  # in place: the checkpoint's keys stay the network's own
    trainer.fit(module, datamodule=data, ckpt_path=out / LAST if start else None, weights_only=True)
    result.metrics = {k: v for k, v in recorder.history[-1].items() if "/" in k}
    result.metrics |= _tested(trainer, module, data) | _best(recorder)
    _conclude(trainer, module, recorder, result.metrics)
    if rank_zero():
        _draw(recorder, out, cfg.sparsity)
    result.cost = costs.record()
    result.details |= _details(network.model, module, recorder, costs)


def _rates(factories: dict[str, Callable], epochs: int) -> Rates:
    try:
        return Rates(lr_per_epoch(**factories, epochs=epochs), sgd_momentum(factories["optimizer"]))
    except Exception as error:
        raise ConfigError(f"optimizer or scheduler cannot be built: {error}") from error


def _module(cfg: TrainConfig, network: Network, num_classes: int, factories: dict[str, Callable]) -> SlimmingModule:
    """Build the LightningModule.

    Raises:
        ConfigError: a penalty on a network without trainable BatchNorm scales.
    """
    kind, extra = SlimmingModule, {}
    if network.teacher is not None:
        kind, extra = DistillingModule, {"teacher": network.teacher, **(network.distillation or {})}
    module = kind(
        network.model,
        num_classes,
        **factories,
        sparsity=cfg.sparsity,
        penalty_layers=cfg.penalty.layers,
        decay_batchnorm=cfg.decay_batchnorm,
        record=network.record.to_dict(),
        **extra,
    )
    if cfg.sparsity and not module.penalty.gammas:
        instead = other_norms(network.model)
        raise ConfigError(
            f"sparsity={cfg.sparsity:g}, but {model_label(network.record.model, network.model)} has no BatchNorm with a "
            f"trainable scale to penalise{instead and f' ({instead})'}: insert BatchNorm after its convolutions, or set "
            "sparsity=0"
        )
    module.optimizer_state = network.optimizer_state
    return module


def _trainer(cfg: TrainConfig, run: Run, recorder: Recorder) -> pl.Trainer:
    lines = [EpochLines()] if cfg.trainer.get("enable_progress_bar", True) else []
    return build(
        "trainer",
        cfg.trainer | torchrun_devices(),
        callbacks=[*lines, recorder, *(build(f"callbacks.{k}", c) for k, c in cfg.callbacks.items())],
        logger=run.loggers,
        plugins=[AtomicCheckpointIO()],
        default_root_dir=str(run.out),
        use_distributed_sampler=False,  # the data modules share out the images themselves
    )


def _connect_ranks_and_load(trainer: pl.Trainer, data: ImageData) -> None:
    """Connect the ranks, then load the data; what has to be downloaded or decoded is so by one of each machine."""
    if data.batch_size % trainer.world_size:
        raise ConfigError(
            f"data.batch_size={data.batch_size} must be a multiple of the {trainer.world_size} devices: it is shared out"
        )
    trainer.strategy.setup_environment()
    precision.check_agreed(trainer)
    if trainer.local_rank == 0:
        data.prepare_data()
    trainer.strategy.barrier()
    data.setup()


def _check_data(before: dict | None, data: ImageData, out: Path) -> None:
    """Raise CheckpointError if the data are not those that the run began with, as far as their statistics tell."""
    if before is not None and (differences := config_differences({"data": before}, {"data": data.statistics()})):
        raise CheckpointError(
            f"the data have changed since {out} began: {differences}. Put them back to resume it, or start another run"
        )


def _synchronised(model: nn.Module, trainer: pl.Trainer) -> nn.Module:
    """Let BatchNorms share their statistics over all ranks.

    Raises:
        ConfigError: several processes without GPUs, which torch's SyncBatchNorm needs.
    """
    if trainer.world_size == 1:
        return model
    if trainer.strategy.root_device.type != "cuda":
        raise ConfigError(
            "sync_batchnorm=true needs GPUs: torch has no synchronised BatchNorm for several CPU processes"
        )
    return synchronise(model)


# --- resuming -----------------------------------------------------------------------------------------------------------


def resume_point(resume: bool, config: dict, out: Path) -> Checkpoint | None:
    """Return out/last.ckpt to go on from, None if there is none yet.

    Raises:
        RunDirectoryError: there is a run, and `resume` is false or it has another configuration.
        CheckpointError: unreadable.
    """
    path = out / LAST
    if not path.exists():
        return None
    if not resume:
        raise RunDirectoryError(
            f"{out} holds a run already: go on with it by resume=true, or give another hydra.run.dir"
        )
    saved = checkpoint.read(path)
    before = saved.record.need(path, "config").config or {}
    if odd := [k for k, kind in PROGRESS.items() if not isinstance(saved.content.get(k), kind)]:
        raise CheckpointError(f"{path} cannot be resumed: its {odd[0]} is not there or malformed")
    if differences := config_differences(before, config):
        raise RunDirectoryError(
            f"{out} holds a run with another configuration: {differences}. "
            "Give the same values to resume it, or start another run with init_from"
        )
    return saved


# --- what a training says and leaves --------------------------------------------------------------------------------------


def _size(costs: Cost) -> str:
    return f"{costs.num_params:,} parameters, {costs.macs / 1e6:,.1f}M MACs{uncounted(costs.record())}"


def _announce(cfg: TrainConfig, trainer: pl.Trainer, module: SlimmingModule, rates: Rates, data: ImageData) -> None:
    """Say what is penalised, and whether the penalty can bring a gamma to zero in this run."""
    say, gammas = trainer.print, module.penalty.flat()
    penalty = f"penalised, lambda {cfg.sparsity:g}" if cfg.sparsity else "not penalised"
    say(f"  {len(gammas):,} gammas in {len(module.penalty.gammas)} BatchNorms are {penalty}")
    if not cfg.sparsity:
        return
    if rates.momentum is None:
        say("  maximum shrinkage: known for SGD only, not for this optimizer")
        return
    lr_sum = sum(rates.per_epoch) * _steps_per_epoch(data, trainer)
    shrinkage, start = max_shrinkage(cfg.sparsity, lr_sum, rates.momentum), float(gammas.median())
    say(
        f"  maximum shrinkage: the penalty alone can move a gamma by {shrinkage:.3g}; they start at {start:.3g} (median)"
    )
    if shrinkage < start:
        say(f"  WARNING: {shrinkage:.3g} < {start:.3g}: even a gamma that the loss ignores cannot reach 0 in this run.")
        say(f"  Train longer, or raise sparsity to {cfg.sparsity * start / shrinkage:.1e} or more")


def _announce_start(say: Say, cfg: TrainConfig, trainer: pl.Trainer, start: Checkpoint | None) -> None:
    precision.tell(say, trainer)
    if start:
        say(f"  resuming after epoch {start.content['epoch'] + 1} of {trainer.max_epochs}")
    elif cfg.resume:
        say("  nothing to resume in the run directory yet: starting from the beginning")


def _steps_per_epoch(data: ImageData, trainer: pl.Trainer) -> int:
    """Count optimizer steps of an epoch over all devices."""
    batches = math.ceil(len(data.splits["train"]) / data.batch_size)
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return math.ceil(batches / trainer.accumulate_grad_batches)


def _tested(trainer: pl.Trainer, module: SlimmingModule, data: ImageData) -> dict[str, float]:
    """Return test/acc of the last epoch; nothing where testing is limited to no batch."""
    tested = trainer.test(module, datamodule=data, verbose=False)
    return {k: float(v) for k, v in (tested[0] if tested else {}).items() if k == "test/acc"}


def _best(recorder: Recorder) -> dict[str, float]:
    best = recorder.best
    return {"val/acc_best": best["val/acc"], "best_epoch": best["epoch"]} if best else {}


def _conclude(trainer: pl.Trainer, module: SlimmingModule, recorder: Recorder, metrics: dict[str, float]) -> None:
    best = f"; best.ckpt: epoch {recorder.best['epoch']}, val {recorder.best['val/acc']:.2%}" if recorder.best else ""
    trainer.print(
        f"test accuracy {metrics.get('test/acc', math.nan):.2%} after epoch {trainer.max_epochs}{best}; "
        f"{near_zero_share(module.penalty.flat()):.1%} of the gammas are below 1% of the largest"
    )


def _draw(recorder: Recorder, out: Path, sparsity: float) -> None:
    figures.curves(recorder.history, out / "curves.png")
    if any(map(sum, recorder.gammas)):
        figures.gammas(recorder.gammas, BINS.tolist(), out / "gammas.png", sparsity)


def _details(model: nn.Module, module: SlimmingModule, recorder: Recorder, costs: Cost) -> dict[str, Any]:
    share = near_zero_share(module.penalty.flat())
    return {
        "activation_bytes": costs.activation_bytes,
        "widths": widths(model),
        "history": recorder.history,
        "gammas": {"edges": BINS.tolist(), "counts": recorder.gammas, "near_zero_share": share},
        "size_bytes": weight_bytes(module.model),
        "n_test": module.evaluated.get("test", 0),
    }
