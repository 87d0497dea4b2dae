"""Fine-tuning a pruned network, or training its architecture from fresh weights."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimming import checkpoint
from slimming.channels.options import PenaltyOptions, check_penalty
from slimming.channels.plan import PruningPlan
from slimming.channels.surgery import prune_optimizer_state
from slimming.checkpoint import Checkpoint
from slimming.config import DistillConfig, FinetuneConfig, TrainConfig, TrainOptions, plain
from slimming.data import ImageData
from slimming.data.sampler import mix
from slimming.errors import ConfigError, check_number
from slimming.models import redraw
from slimming.records import Record, Result
from slimming.stages.building import build, build_data, example_of, inherit, model_spec, shape_of, try_model
from slimming.stages.fitting import Network, fit
from slimming.stages.precision import settled
from slimming.stages.recording import rank_zero, recorded, relative
from slimming.stages.resuming import LAST, resume_point
from slimming.stages.splitting import split
from slimming.stages.tasks import Task, task_of
from slimming.training.module import parameter_groups

GROUPS = ("data", "optimizer", "scheduler", "trainer")
LENGTHS = ("max_epochs", "T_max")  # values of a schedule that are the number of epochs
SCRATCH = 0x5C7A7C4  # sets the seed of fresh weights apart
MOST_EVER = 10**6  # epochs; a file may claim any number
MOST_EPOCHS = 4  # times as many as asked, with epochs_by=macs


def finetune(cfg: FinetuneConfig, out: Path) -> float:
    """Train a checkpoint's network further, by default with its own recipe and without the penalty.

    Leaves in `out` what `train` leaves.

    Returns:
        The test accuracy (of a detector mAP@0.5) of the last epoch, in [0, 1].

    Raises:
        SlimmingError: anything that the user can mend; result.json then says `failed`.
    """
    role = "scratch" if cfg.init == "scratch" else "sparse" if cfg.sparsity else "finetuned"
    begun = Result("finetune", role, parent=relative(cfg.checkpoint, out), asked=plain(cfg))
    with recorded(out, begun, cfg.logger, cfg.checkpoint) as run:
        saved = checkpoint.read(cfg.checkpoint)
        saved.record.need(cfg.checkpoint, "config", "data")
        recipe = recipe_of(cfg, saved.record)
        recipe.trainer = settled(recipe.trainer, out / LAST)
        run.result.seed = recipe.seed
        torch.manual_seed(recipe.seed)
        data = build_data(recipe.data)
        task = task_of(recipe)
        cfg = dataclasses.replace(cfg, distill=_distillation(cfg.distill, task))
        facts = task.facts(cfg.model, shape_of(data))
        dense = build("model", cfg.model, **facts) if cfg.model.get("_target_") else None  # None: the checkpoint's
        network = _network(cfg, recipe, saved, data, dense)
        if not saved.record.plans and rank_zero():
            print(f"{cfg.checkpoint} was never pruned: it is trained further as it is")
        if cfg.epochs_by == "macs":
            _stretch(recipe, checkpoint.architecture(saved, dense, pruned=False), network.model, example_of(data))
        run.result.config = network.record.config = plain(recipe) | {"finetune": _choices(cfg)}
        if cfg.distill.teacher:
            network.teacher = _teacher(cfg.distill.teacher, dense)
            task.check_teacher(cfg.distill.teacher, network.teacher, network.model, data)
            network.distillation = {"temperature": cfg.distill.temperature, "alpha": cfg.distill.alpha}
        start = resume_point(cfg.resume, run.result.config, out)
        fit(recipe, run, network, data, start)
    return run.result.metrics.get(f"test/{task.score}", math.nan)


def _distillation(given: DistillConfig, task: Task) -> DistillConfig:
    """Return the options of distillation with what the task has for those that are not given, where there is a teacher."""
    usual = {key: getattr(task, key) for key in ("temperature", "alpha") if getattr(given, key) is None}
    return dataclasses.replace(given, **usual) if given.teacher else given


def _choices(cfg: FinetuneConfig) -> dict[str, Any]:
    """Return the options of a fine-tuning that a training does not have."""
    names = ("init", "epochs_by", "optimizer_state", "low_rank")
    return {name: getattr(cfg, name) for name in names} | {"distill": dataclasses.asdict(cfg.distill)}


def recipe_of(cfg: FinetuneConfig, record: Record) -> TrainConfig:
    """Return the training of a checkpoint's record with the values that are given now.

    Raises:
        CheckpointError: the record names a class that is not known.
        ConfigError: neither the record (of a reference implementation) nor the command line has a recipe.
    """
    before = record.config or {}
    groups = {group: inherit(group, getattr(cfg, group), before.get(group)) for group in GROUPS}
    for group, node in groups.items():
        if not node.get("_target_"):
            raise ConfigError(f"{cfg.checkpoint} comes without a recipe: give {group}=<name of configs/{group}/>")
    epochs = groups["trainer"].get("max_epochs")
    if epochs is None:
        raise ConfigError(
            "trainer.max_epochs is missing: a trainer that is given replaces the checkpoint's whole, and this one "
            "(one_device is prune.py's) has none; give trainer=default trainer.max_epochs=<number>, or single values alone"
        )
    check_number("trainer.max_epochs", epochs, 1, MOST_EVER, whole=True)
    groups["scheduler"] = fit_schedule(groups["scheduler"], before.get("trainer", {}).get("max_epochs"), epochs)
    options = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(TrainOptions)}
    for name, default in (("decay_batchnorm", True), ("channels_last", True), ("seed", 1)):
        if options[name] is None:
            options[name] = before.get(name, default)
    if cfg.data.get("seed") is None:
        groups["data"] = groups["data"] | {"seed": options["seed"]}
    options["penalty"] = penalty_of(cfg, before.get("penalty"))
    model = cfg.model if cfg.model.get("_target_") else before.get("model", {})
    return TrainConfig(task=task_of(before).name, model=model, **groups, **options)


def penalty_of(cfg: FinetuneConfig, recorded: Any) -> PenaltyOptions:
    """Return the penalty of a checkpoint's record with the values that are given now; a given name replaces it whole.

    Without sparsity the record does not count: nothing is penalised, and all gammas are watched.

    Raises:
        ConfigError: a value that is not allowed, of the record or given.
    """
    values = {f.name: getattr(cfg.penalty, f.name) for f in dataclasses.fields(PenaltyOptions)}
    given = {key: value for key, value in values.items() if value is not None}
    known = recorded if isinstance(recorded, dict) and cfg.sparsity and "name" not in given else {}
    penalty = PenaltyOptions(**{key: known[key] for key in values if known.get(key) is not None} | given)
    check_penalty(penalty)
    return penalty


def fit_schedule(schedule: dict, before: int | None, epochs: int) -> dict:
    """Return a schedule fitted to a number of epochs where it was fitted to that of before."""
    return {k: epochs if k in LENGTHS and v in (None, before) else v for k, v in schedule.items()}


def _network(
    cfg: FinetuneConfig, recipe: TrainConfig, saved: Checkpoint, data: ImageData, dense: nn.Module | None
) -> Network:
    """Build the network to train, in train mode, with the checkpoint's weights or fresh ones.

    Args:
        dense: the dense network of a checkpoint whose model is not registered.
    """
    record = saved.record
    here = {key: shape_of(data)[key] for key in record.io_shape}
    if record.io_shape != here:
        raise ConfigError(f"the data have {here}, {cfg.checkpoint} was trained for {record.io_shape}")
    for plan in record.plans:
        if not plan.get("train_watched", True):
            raise ConfigError(
                f"{cfg.checkpoint} cannot be fine-tuned: the network could not be run in train mode when it was pruned "
                f"({plan.get('train_reason')}), so layers that only run there were not resized; prune it by the library "
                "with slimming.trace(..., train_input=...)"
            )
    if cfg.init == "scratch":
        model = checkpoint.architecture(saved, dense)
        # Not with the seed of the training, whose first weights these would be: a lottery ticket, not a scratch.
        torch.manual_seed(mix(recipe.seed, SCRATCH))
        registered = (
            record.model if dense is None else model_spec(cfg.model, task_of(recipe).facts(cfg.model, shape_of(data)))
        )
        redraw(model, None if record.low_rank else registered)  # no factory makes factors
    else:
        model = checkpoint.rebuild(saved, dense)
    model, splits = _split(cfg, model, record, example_of(data))
    network = Network(model.train(), Record(record.model, record.plans, stage="finetune", low_rank=splits))
    if cfg.optimizer_state:
        network.optimizer_state = _sliced_state(cfg, recipe, record, dense)
    return network


def _split(cfg: FinetuneConfig, model: nn.Module, record: Record, example: torch.Tensor) -> tuple[nn.Module, Any]:
    """Split layers into factors of low rank where that is asked; return the network and all its splits."""
    if cfg.low_rank is None:
        return model, record.low_rank
    found = split(model, cfg.low_rank, record, example, cfg.checkpoint)
    return found.model, found.splits or None


def _sliced_state(cfg: FinetuneConfig, recipe: TrainConfig, record: Record, dense: nn.Module | None) -> dict:
    """Return the optimizer state of the training before the last pruning, sliced as the weights were."""
    path = Path(cfg.checkpoint).parent / (record.parent or "")
    if record.stage != "prune" or not record.plans or not path.is_file():
        raise ConfigError(f"optimizer_state=true needs the checkpoint that {cfg.checkpoint} was pruned from, at {path}")
    before = checkpoint.read(path)
    config = before.record.need(path, "config").config or {}
    if len(before.record.plans) >= len(record.plans):
        raise ConfigError(
            f"optimizer_state=true: channels left while {path} was trained, and its state with them; begin without it"
        )
    if not _has_state(before.content.get("optimizer_states")):
        raise ConfigError(f"optimizer_state=true: {path} holds no optimizer state")
    was, now = (c.get("optimizer", {}).get("_target_") for c in (config, plain(recipe)))
    if was != now:
        raise ConfigError(f"optimizer_state=true: the training used {was}, this one uses {now}")
    wide = checkpoint.architecture(before, dense)
    names = [n for _, group in parameter_groups(wide, recipe.decay_batchnorm) for n in group]
    if recipe.decay_batchnorm != config.get("decay_batchnorm", True):
        raise ConfigError("optimizer_state=true needs the decay_batchnorm of the training")
    plan = PruningPlan.from_dict(record.plans[-1])
    return prune_optimizer_state(before.content["optimizer_states"][0], wide, plan, names)


def _has_state(states: Any) -> bool:
    """Return whether a checkpoint's optimizer states are those of one optimizer, as torch saves them."""
    good = isinstance(states, list) and len(states) == 1 and isinstance(states[0], dict)
    state = states[0].get("state") if good else None
    return isinstance(state, dict) and all(isinstance(entry, dict) for entry in state.values())


def _stretch(recipe: TrainConfig, dense: nn.Module, thin: nn.Module, example: torch.Tensor) -> None:
    """Give the recipe as many epochs as the dense network's compute buys with the thin one."""
    wide, small = try_model(dense, example).macs, try_model(thin, example).macs
    asked = recipe.trainer["max_epochs"]
    epochs = min(MOST_EPOCHS * asked, round(asked * wide / small))
    recipe.trainer["max_epochs"] = epochs
    recipe.scheduler = fit_schedule(recipe.scheduler, asked, epochs)
    print(f"epochs_by=macs: {asked} epochs x {wide / 1e6:,.1f}M / {small / 1e6:,.1f}M MACs -> {epochs} epochs")


def _teacher(path: str, dense: nn.Module | None) -> nn.Module:
    """Load the teacher; `dense` is the dense network of one that is not registered."""
    saved = checkpoint.read(path)
    return checkpoint.rebuild(saved, None if saved.record.model else dense)
