"""The training of a network, new or thin: what `train` and `finetune` have in common."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from slimming.channels.copying import copy_model
from slimming.channels.cost import Cost, widths
from slimming.channels.layers import synchronise
from slimming.channels.penalty import Penalty, batchnorm_gammas, near_zero_share, other_norms
from slimming.channels.surgery import prune
from slimming.checkpoint import Checkpoint
from slimming.config import TrainConfig
from slimming.data import ImageData
from slimming.errors import ConfigError
from slimming.ranks import torchrun_devices
from slimming.records import SCORES, Record
from slimming.report import figures
from slimming.stages import precision, shrinking
from slimming.stages.building import build, build_trainer, data_label, dtype_of, example_of, model_label, try_model
from slimming.stages.fitting_text import Rates, announce, announce_shrink, announce_start, conclude, lambda_of, size
from slimming.stages.measuring import weight_bytes
from slimming.stages.recording import OngoingStage, rank_zero
from slimming.stages.resuming import LAST, check_same_data
from slimming.stages.tasks import Task, task_of
from slimming.training.module import PenalisedModule
from slimming.training.progress import EpochLines
from slimming.training.recorder import BINS, AtomicCheckpointIO, Recorder
from slimming.training.schedules import lr_per_epoch, sgd_momentum
from slimming.training.shrinking import Shrinking, staying
from slimming.training.steering import Steering


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


def fit(cfg: TrainConfig, run: OngoingStage, network: Network, data: ImageData, start: Checkpoint | None) -> None:
    """Train a network; add to `run.result` what comes of it.

    Args:
        start: last.ckpt of the run directory to resume from, None to begin.
    """
    out, result = run.out, run.result
    if cfg.trainer.get("sync_batchnorm"):
        raise ConfigError(
            "trainer.sync_batchnorm would forget the indices of pruned BatchNorms: set sync_batchnorm=true"
        )
    wide = try_model(network.model, example_of(data))
    fitting = _Fitting(cfg, network, data, out)
    if start:
        fitting.become_as_left(start)
    module, recorder = fitting.module(), Recorder(out)
    trainer = _trainer(cfg, run, [*fitting.callbacks(module), recorder])
    if start:
        precision.check_kept(trainer, cfg.trainer.get("precision"))
    _connect_ranks_and_load(trainer, data)
    if start:
        check_same_data(start.record.data, data, out)
    result.model, result.data = model_label(network.record.model, network.model), data_label(cfg.data)
    costs = try_model(network.model, example_of(data))
    trainer.print(f"{result.model} on {type(data).__name__}: {size(costs)}\n  run directory: {out}")
    announce(cfg, trainer, module, fitting.rates, data)
    announce_start(trainer.print, cfg, trainer, start)
    module = fitting.run(trainer, module, resume=start is not None)
    result.metrics = {k: v for k, v in recorder.history[-1].items() if "/" in k}
    result.metrics |= _tested(trainer, module, data, task_of(cfg)) | _best(recorder)
    conclude(trainer, module, recorder, result.metrics, task_of(cfg))
    if rank_zero():
        _draw(recorder, out, lambda_of(cfg), task_of(cfg))
        task_of(cfg).draw({"trained": module.model}, data, out)
    costs = try_model(network.model, example_of(data))
    result.cost = costs.record()
    result.details |= _details(network.model, module, recorder, costs)
    if cfg.shrink:
        result.details |= {"cost_before": wide.record(), "shrinks": shrinking.history(network.record)}


class _Fitting:
    """One fit or, where channels leave on the way, several: each resumes what the last has left, with a thinner network."""

    def __init__(self, cfg: TrainConfig, network: Network, data: ImageData, out: Path) -> None:
        self.cfg, self.network, self.data, self.out = cfg, network, data, out
        self.factories = {k: build(k, getattr(cfg, k), _partial_=True) for k in ("optimizer", "scheduler")}
        self.rates = _rates(self.factories, cfg.trainer["max_epochs"])
        self.wide: Penalty | None = None  # of the network that the training began with, once channels have left it
        self.kept = torch.empty(0, dtype=torch.long)  # of its gammas
        self.left = shrinking.leaving(cfg, network.model, network.record, self._example())
        self.shrinking = [Shrinking(cfg.shrink.threshold, cfg.shrink.epochs)] if cfg.shrink else []
        self.steering: list[Steering] = []

    def _example(self) -> torch.Tensor:
        return example_of(self.data).to(dtype_of(self.network.model))

    def become_as_left(self, saved: Checkpoint) -> bool:
        """Let the channels go that a training's last.ckpt lacks; return whether there were any."""
        if self.cfg.shrink and self.wide is None:
            self.wide = self._module().penalty
            self.kept = torch.arange(len(self.wide.flat()))
        plans = shrinking.plans_since(self.network.record, saved)
        for plan in plans:
            self.kept = self.kept[staying(batchnorm_gammas(self.network.model, self.cfg.penalty.layers), plan)]
            self.network.model = prune(self.network.model, plan, verify=False)
        self.network.record = replace(self.network.record, plans=saved.record.plans)
        return bool(plans)

    def module(self) -> PenalisedModule:
        """Build the LightningModule of the network as it is now."""
        if self.cfg.channels_last:
            self.network.model.to(memory_format=torch.channels_last)
        module = self._module()
        if self.wide is not None:
            module.penalty.narrow(self.wide, self.kept)
        return module

    def _module(self) -> PenalisedModule:
        return _module(self.cfg, self.network, self._example(), self.data.num_classes, self.factories)

    def callbacks(self, module: PenalisedModule) -> list[pl.Callback]:
        self.steering = _steering(self.cfg, module, self.rates)
        return [*self.steering, *self.shrinking]

    def run(self, trainer: pl.Trainer, module: PenalisedModule, resume: bool) -> PenalisedModule:
        """Train to the end; return the module that was trained last."""
        if self.shrinking:
            shrinking.check_callbacks(trainer)
        self._fit(trainer, module, resume)
        while any(callback.due for callback in self.shrinking):
            saved = shrinking.go_on(trainer, self.left, self.out / LAST, self.network.model)
            if self.become_as_left(saved):
                announce_shrink(trainer.print, self.network.record, try_model(self.network.model, self._example()))
            module = self.module()
            for callback in self.steering:
                callback.penalty = module.penalty
            self._fit(trainer, module, resume=True)
        return module

    def _fit(self, trainer: pl.Trainer, module: PenalisedModule, resume: bool) -> None:
        if self.cfg.sync_batchnorm:
            module.model = _synchronised(module.model, trainer)
        if self.cfg.compile:
            module.model.compile()  # in place: the checkpoint's keys stay the network's own
        trainer.fit(module, datamodule=self.data, ckpt_path=self.out / LAST if resume else None, weights_only=True)


def _rates(factories: dict[str, Callable], epochs: int) -> Rates:
    try:
        return Rates(lr_per_epoch(**factories, epochs=epochs), sgd_momentum(factories["optimizer"]))
    except Exception as error:
        raise ConfigError(f"optimizer or scheduler cannot be built: {error}") from error


def _module(
    cfg: TrainConfig, network: Network, example: torch.Tensor, num_classes: int, factories: dict[str, Callable]
) -> PenalisedModule:
    """Build the LightningModule; where channels leave on the way it trains a copy, so that the network stays as it is now.

    Raises:
        ConfigError: a penalty on a network without trainable BatchNorm scales.
    """
    extra = {} if network.teacher is None else {"teacher": network.teacher, **(network.distillation or {})}
    module = task_of(cfg).module(
        copy_model(network.model) if cfg.shrink else network.model,
        num_classes,
        **factories,
        sparsity=0.0 if cfg.sparsity == "auto" else cfg.sparsity,
        penalty=cfg.penalty.name,
        penalty_layers=cfg.penalty.layers,
        penalty_t=cfg.penalty.t,
        example=example,
        decay_batchnorm=cfg.decay_batchnorm,
        record=network.record.to_dict(),
        **extra,
    )
    if cfg.sparsity and not module.penalty.gammas:
        instead = other_norms(network.model)
        raise ConfigError(
            f"sparsity={cfg.sparsity}, but {model_label(network.record.model, network.model)} has no BatchNorm with a "
            f"trainable scale to penalise{instead and f' ({instead})'}: insert BatchNorm after its convolutions, or set "
            "sparsity=0"
        )
    module.optimizer_state = network.optimizer_state
    return module


def _steering(cfg: TrainConfig, module: PenalisedModule, rates: Rates) -> list[pl.Callback]:
    """Return what sets lambda during the training, where it is not fixed.

    Raises:
        ConfigError: another optimizer than SGD, whose steps do not follow from its learning rate.
    """
    if cfg.sparsity != "auto":
        return []
    if rates.momentum is None:
        raise ConfigError(
            f"sparsity=auto is for optimizer=sgd: how far {cfg.optimizer.get('_target_')} moves a gamma does not follow "
            "from its learning rate; give a number for sparsity"
        )
    return [Steering(module.penalty, cfg.target_ratio, rates.per_epoch, rates.momentum)]


def _trainer(cfg: TrainConfig, run: OngoingStage, ours: list[pl.Callback]) -> pl.Trainer:
    lines = [EpochLines()] if cfg.trainer.get("enable_progress_bar", True) else []
    return build_trainer(
        cfg.trainer | torchrun_devices(),
        callbacks=[*lines, *ours, *(build(f"callbacks.{k}", c) for k, c in cfg.callbacks.items())],
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


def _tested(trainer: pl.Trainer, module: PenalisedModule, data: ImageData, task: Task) -> dict[str, float]:
    """Return the metrics of the last epoch on the test images; nothing where testing is limited to no batch."""
    tested = trainer.test(module, datamodule=data, verbose=False)
    return task.measured(tested[0] if tested else {}, "test")


def _best(recorder: Recorder) -> dict[str, float]:
    """Return the best score on the validation split and its epoch, where there is one."""
    return {"best_epoch" if k == "epoch" else f"{k}_best": v for k, v in (recorder.best or {}).items()}


def _draw(recorder: Recorder, out: Path, penalty: str, task: Task) -> None:
    figures.curves(recorder.history, out / "curves.png", SCORES[task.name])
    if any(map(sum, recorder.gammas)):
        figures.gammas(recorder.gammas, BINS.tolist(), out / "gammas.png", penalty)


def _details(model: nn.Module, module: PenalisedModule, recorder: Recorder, costs: Cost) -> dict[str, Any]:
    share = near_zero_share(module.penalty.flat())
    return {
        "activation_bytes": costs.activation_bytes,
        "widths": widths(model),
        "history": recorder.history,
        "gammas": {"edges": BINS.tolist(), "counts": recorder.gammas, "near_zero_share": share},
        "size_bytes": weight_bytes(module.model),
        "n_test": module.evaluated.get("test", 0),
    }
