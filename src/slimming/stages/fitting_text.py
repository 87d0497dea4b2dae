"""What a training says at its start and its end."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import lightning.pytorch as pl

from slimming.channels.cost import Cost
from slimming.channels.penalty import near_zero_share
from slimming.checkpoint import Checkpoint
from slimming.config import TrainConfig
from slimming.data import ImageData
from slimming.records import Record
from slimming.stages import precision
from slimming.stages.measuring import uncounted
from slimming.stages.tasks import Task
from slimming.training.module import PenalisedModule
from slimming.training.recorder import Recorder

Say = Callable[..., None]  # prints on the first rank


@dataclass
class Rates:
    """What is known of an optimizer before it runs: its learning rate in every epoch, and SGD's momentum (else None)."""

    per_epoch: list[float]
    momentum: float | None


def size(costs: Cost) -> str:
    return f"{costs.num_params:,} parameters, {costs.macs / 1e6:,.1f}M MACs{uncounted(costs.record())}"


def announce(cfg: TrainConfig, trainer: pl.Trainer, module: PenalisedModule, rates: Rates, data: ImageData) -> None:
    """Say what is penalised, and whether the penalty can bring a gamma to zero in this run."""
    say, gammas = trainer.print, module.penalty.flat()
    how = f" {module.penalty.describe()}".rstrip()
    penalty = f"penalised{how}, {lambda_of(cfg)}" if cfg.sparsity else "not penalised"
    say(f"  {len(gammas):,} gammas in {len(module.penalty.gammas)} BatchNorms are {penalty}")
    if not cfg.sparsity:
        return
    if cfg.sparsity == "auto":
        say(f"  lambda is set during the run, so that {cfg.target_ratio:.0%} of them end below 1% of the largest")
        return
    lr_sum = sum(rates.per_epoch) * _steps_per_epoch(data, trainer)
    reach, start = module.penalty.reach(lr_sum, rates.momentum), module.penalty.start()
    if reach is None:
        say("  maximum shrinkage: known for SGD only, not for this optimizer")
        return
    shrinkage = cfg.sparsity * reach
    say(
        f"  maximum shrinkage: the penalty alone can move {module.penalty.moves} {shrinkage:.3g}; "
        f"they start at {start:.3g} (median)"
    )
    if shrinkage < start:
        say(f"  WARNING: {shrinkage:.3g} < {start:.3g}: even a gamma that the loss ignores cannot reach 0 in this run.")
        say(f"  Train longer, or raise sparsity to {cfg.sparsity * start / shrinkage:.1e} or more")


def lambda_of(cfg: TrainConfig) -> str:
    """Name the penalty's strength: `lambda 0.0001`, `lambda auto`."""
    return f"lambda {cfg.sparsity if cfg.sparsity == 'auto' else format(cfg.sparsity, 'g')}"


def announce_start(say: Say, cfg: TrainConfig, trainer: pl.Trainer, start: Checkpoint | None) -> None:
    precision.tell(say, trainer)
    if start:
        say(f"  resuming after epoch {start.content['epoch'] + 1} of {trainer.max_epochs}")
    elif cfg.resume:
        say("  nothing to resume in the run directory yet: starting from the beginning")


def announce_shrink(say: Say, record: Record, costs: Cost) -> None:
    """Say what has left the network by the last plan of its record."""
    asked, got = record.plans[-1]["asked"], record.plans[-1]["got"]
    say(f"  after epoch {asked['epoch']}, {got['removed'] + got['dead']:,} gammas left the network: {size(costs)}")


def _steps_per_epoch(data: ImageData, trainer: pl.Trainer) -> int:
    """Count optimizer steps of an epoch over all devices."""
    batches = math.ceil(len(data.splits["train"]) / data.batch_size)
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return math.ceil(batches / trainer.accumulate_grad_batches)


def conclude(
    trainer: pl.Trainer, module: PenalisedModule, recorder: Recorder, metrics: dict[str, float], task: Task
) -> None:
    found = recorder.best
    best = f"; best.ckpt: epoch {found['epoch']}, val {found[f'val/{task.score}']:.2%}" if found else ""
    trainer.print(
        f"test {task.called} {metrics.get(f'test/{task.score}', math.nan):.2%} after epoch {trainer.max_epochs}{best}; "
        f"{near_zero_share(module.penalty.flat()):.1%} of the gammas are below 1% of the largest"
    )
