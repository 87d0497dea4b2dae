"""Training with the gamma penalty."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from slimming import checkpoint, models
from slimming.channels.cost import widths
from slimming.channels.layers import synchronise
from slimming.channels.penalty import max_shrinkage, near_zero_share, other_norms
from slimming.config import TrainConfig, plain
from slimming.data import ImageData
from slimming.errors import CheckpointError, ConfigError, RunDirectoryError
from slimming.ranks import torchrun_devices
from slimming.records import config_differences
from slimming.report import figures
from slimming.stages import precision
from slimming.stages.common import (
    build,
    build_data,
    example_of,
    model_label,
    model_spec,
    rank_zero,
    recorded,
    relative,
    try_model,
    uncounted,
    weight_bytes,
)
from slimming.training.distillation import DistillingModule
from slimming.training.module import SlimmingModule
from slimming.training.progress import EpochLines
from slimming.training.recorder import BINS, AtomicCheckpointIO, Recorder
from slimming.training.schedules import lr_per_epoch, sgd_momentum
from slimming.untrusted import need

PROGRESS = {"epoch": int, "global_step": int, "loops": dict, "optimizer_states": list, "lr_schedulers": list}

LAST = "last.ckpt"


@dataclass
class Network:
    """A network on its way into a training, and what its checkpoint must say of it.

    Attributes:
        spec, plans: as in a checkpoint's record.
        extra: what the record's configuration holds beyond a training's.
        optimizer_state: to begin with.
        teacher: None, or a network to learn from.
    """

    model: nn.Module
    spec: dict | None
    plans: list[dict] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    optimizer_state: dict | None = None
    teacher: nn.Module | None = None


def train(cfg: TrainConfig, out: Path) -> float:
    """Train with the gamma penalty; leave last.ckpt, result.json, metrics.csv, curves.png and gammas.png in `out`.

    Returns:
        The test accuracy of the last epoch, in [0, 1].

    Raises:
        SlimmingError: anything that the user can mend; result.json then says `failed`.
    """
    result = {"stage": "train", "role": "sparse" if cfg.sparsity else "baseline", "seed": cfg.seed}
    result |= {"parent": relative(cfg.init_from, out), "config": plain(cfg)}
    with recorded(out, result) as result:
        cfg = replace(cfg, data=normalised(cfg), trainer=precision.settled(cfg.trainer, out / LAST))
        result["config"] = plain(cfg)
        start = resume_point(cfg.resume, result["config"], out)
        torch.manual_seed(cfg.seed)
        data = build_data(cfg.data)
        heads = {"num_classes": data.num_classes, "in_channels": data.in_channels}
        network = Network(build("model", cfg.model, **heads), model_spec(cfg.model, heads))
        if cfg.init_from:
            try_model(network.model, example_of(data))
            checkpoint.load_weights(network.model, checkpoint.read(cfg.init_from), cfg.init_from)
        result |= fit(cfg, out, network, data, start)
    return result["metrics"].get("test/acc", math.nan)


def normalised(cfg: TrainConfig) -> dict[str, Any]:
    """Return the data group, its images normalised as those that pretrained weights were trained on.

    Values that are given (`data.mean`) stay, and so do data that fix their own.
    """
    name = cfg.model.get("_target_", "").removeprefix("slimming.models.")
    wanted = models.normalisation(name, cfg.model)
    return cfg.data | {key: value for key, value in wanted.items() if key in cfg.data and cfg.data[key] is None}


def fit(cfg: TrainConfig, out: Path, network: Network, data: ImageData, start: dict | None) -> dict[str, Any]:
    """Train a network; return what result.json says of it beyond the configuration.

    Args:
        start: the content of out/last.ckpt to resume from, None to begin.
    """
    model, name = network.model, model_label(network.spec, network.model)
    costs = try_model(model, example_of(data))
    if cfg.trainer.get("sync_batchnorm"):
        raise ConfigError(
            "trainer.sync_batchnorm would forget the indices of pruned BatchNorms: set sync_batchnorm=true"
        )
    if cfg.channels_last:
        model.to(memory_format=torch.channels_last)
    factories = {k: build(k, getattr(cfg, k), _partial_=True) for k in ("optimizer", "scheduler")}
    try:
        rates = lr_per_epoch(**factories, epochs=cfg.trainer["max_epochs"])
        momentum = sgd_momentum(factories["optimizer"])
    except Exception as error:
        raise ConfigError(f"optimizer or scheduler cannot be built: {error}") from error
    module = _module(cfg, network, data.num_classes, factories)
    if cfg.sparsity and not module.penalty.gammas:
        instead = other_norms(model)
        raise ConfigError(
            f"sparsity={cfg.sparsity:g}, but {name} has no BatchNorm with a trainable scale to penalise"
            f"{instead and f' ({instead})'}: insert BatchNorm after its convolutions, or set sparsity=0"
        )
    recorder = Recorder(out)
    trainer = _trainer(cfg, out, recorder)
    if start:
        precision.check_kept(trainer, cfg.trainer.get("precision"))
    _meet(trainer, data)
    if start:
        _check_data(start["slimming"].get("data"), data, out)
    if cfg.sync_batchnorm:
        network.model = module.model = _synchronised(model, trainer)
    say = trainer.print
    gammas = module.penalty.flat()
    macs = f"{costs.macs / 1e6:,.1f}M MACs{uncounted(costs.record())}"
    say(f"{name} on {type(data).__name__}: {costs.num_params:,} parameters, {macs}")
    penalty = f"penalised, lambda {cfg.sparsity:g}" if cfg.sparsity else "not penalised"
    say(f"  {len(gammas):,} gammas in {len(module.penalty.gammas)} BatchNorms are {penalty}")
    say(f"  run directory: {out}")
    _tell_budget(say, cfg.sparsity, sum(rates) * _steps_per_epoch(data, trainer), momentum, gammas)
    precision.tell(say, trainer)
    if start:
        say(f"  resuming after epoch {start['epoch'] + 1} of {trainer.max_epochs}")
    elif cfg.resume:
        say("  nothing to resume in the run directory yet: starting from the beginning")
    if cfg.compile:
        module.model.compile()  # in place: the checkpoint's keys stay the network's own
    trainer.fit(module, datamodule=data, ckpt_path=out / LAST if start else None, weights_only=True)
    metrics = {k: v for k, v in recorder.history[-1].items() if "/" in k}
    tested = trainer.test(module, datamodule=data, verbose=False)
    metrics |= {k: float(v) for k, v in (tested[0] if tested else {}).items() if k == "test/acc"}  # not if limited to 0
    best = f"; best.ckpt: epoch {recorder.best['epoch']}, val {recorder.best['val/acc']:.2%}" if recorder.best else ""
    if recorder.best:
        metrics |= {"val/acc_best": recorder.best["val/acc"], "best_epoch": recorder.best["epoch"]}
    gammas = module.penalty.flat()
    if rank_zero():
        figures.curves(recorder.history, out / "curves.png")
    if rank_zero() and len(gammas):
        figures.gammas(recorder.gammas, BINS.tolist(), out / "gammas.png", cfg.sparsity)
    say(f"test accuracy {metrics.get('test/acc', math.nan):.2%} after epoch {trainer.max_epochs}{best}; ", end="")
    say(f"{near_zero_share(gammas):.1%} of the gammas are below 1% of the largest")
    return {
        "model": name,
        "data": type(data).__name__.lower(),
        "metrics": metrics,
        "cost": costs.record(),
        "activation_bytes": costs.activation_bytes,
        "widths": widths(model),
        "history": recorder.history,
        "gammas": {"edges": BINS.tolist(), "counts": recorder.gammas, "near_zero_share": near_zero_share(gammas)},
        "size_bytes": weight_bytes(module.model),
        "n_test": module.evaluated.get("test", 0),
    }


def _meet(trainer: pl.Trainer, data: ImageData) -> None:
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


def _module(cfg: TrainConfig, network: Network, num_classes: int, factories: dict) -> SlimmingModule:
    record = {"format": checkpoint.FORMAT, "model": network.spec, "plans": network.plans}
    record |= {"stage": "finetune" if network.extra else "train", "config": plain(cfg) | network.extra}
    kind, extra = SlimmingModule, {}
    if network.teacher is not None:
        kind, extra = DistillingModule, network.extra["finetune"]["distill"] | {"teacher": network.teacher}
    module = kind(
        network.model,
        num_classes,
        **factories,
        sparsity=cfg.sparsity,
        penalty_layers=cfg.penalty.layers,
        decay_batchnorm=cfg.decay_batchnorm,
        record=record,
        **extra,
    )
    module.optimizer_state = network.optimizer_state
    return module


def _trainer(cfg: TrainConfig, out: Path, recorder: Recorder) -> pl.Trainer:
    lines = [EpochLines()] if cfg.trainer.get("enable_progress_bar", True) else []
    return build(
        "trainer",
        cfg.trainer | torchrun_devices(),
        callbacks=[*lines, recorder, *(build(f"callbacks.{k}", c) for k, c in cfg.callbacks.items())],
        logger=[build(f"logger.{k}", c, save_dir=str(out)) for k, c in cfg.logger.items()],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=str(out),
        use_distributed_sampler=False,  # the data modules share out the images themselves
    )


def resume_point(resume: bool, config: dict, out: Path) -> dict | None:
    """Return the content of out/last.ckpt to go on from, None if there is none yet.

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
    content = checkpoint.read(path)
    need(content["slimming"], path, "config")
    if odd := [k for k, kind in PROGRESS.items() if not isinstance(content.get(k), kind)]:
        raise CheckpointError(f"{path} cannot be resumed: its {odd[0]} is not there or malformed")
    if differences := config_differences(content["slimming"]["config"], config):
        raise RunDirectoryError(
            f"{out} holds a run with another configuration: {differences}. "
            "Give the same values to resume it, or start another run with init_from"
        )
    return content


def _steps_per_epoch(data: ImageData, trainer: pl.Trainer) -> int:
    """Count optimizer steps of an epoch over all devices."""
    batches = math.ceil(len(data.splits["train"]) / data.batch_size)
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return math.ceil(batches / trainer.accumulate_grad_batches)


def _tell_budget(say, sparsity: float, lr_sum: float, momentum: float | None, gammas: torch.Tensor) -> None:
    if not sparsity:
        return
    if momentum is None:
        say("  travel budget: known for SGD only, it does not apply to this optimizer")
        return
    budget, start = max_shrinkage(sparsity, lr_sum, momentum), float(gammas.median())
    say(f"  travel budget: the penalty alone can move a gamma by {budget:.3g}; they start at {start:.3g} (median)")
    if budget < start:
        say(f"  WARNING: {budget:.3g} < {start:.3g}: even a gamma that the loss ignores cannot reach 0 in this run.")
        say(f"  Train longer, or raise sparsity to {sparsity * start / budget:.1e} or more")
