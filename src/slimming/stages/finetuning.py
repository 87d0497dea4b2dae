"""Fine-tuning a pruned network, or training its architecture from fresh weights."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimming import checkpoint
from slimming.channels.plan import PruningPlan
from slimming.channels.surgery import prune_optimizer_state
from slimming.config import FinetuneConfig, TrainConfig, plain
from slimming.data import ImageData
from slimming.data.sampler import mix
from slimming.errors import ConfigError, check_number
from slimming.models import redraw
from slimming.stages.common import (
    build,
    build_data,
    dtype_of,
    example_of,
    inherit,
    model_spec,
    rank_zero,
    recorded,
    relative,
    try_model,
)
from slimming.stages.precision import settled
from slimming.stages.training import LAST, Network, fit, resume_point
from slimming.training.module import parameter_groups
from slimming.untrusted import need

GROUPS = ("data", "optimizer", "scheduler", "trainer")
SAME = ("sparsity", "penalty", "compile", "sync_batchnorm", "resume", "logger", "callbacks")  # of both configurations
LENGTHS = ("max_epochs", "T_max")  # values of a schedule that are the number of epochs
SCRATCH = 0x5C7A7C4  # sets the seed of fresh weights apart
MOST_EVER = 10**6  # epochs; a file may claim any number
MOST_EPOCHS = 4  # times as many as asked, with epochs_by=macs


def finetune(cfg: FinetuneConfig, out: Path) -> float:
    """Train a checkpoint's network further, by default with its own recipe and without the penalty.

    Leaves in `out` what `train` leaves.

    Returns:
        The test accuracy of the last epoch, in [0, 1].

    Raises:
        SlimmingError: anything that the user can mend; result.json then says `failed`.
    """
    extra = {"finetune": {k: getattr(cfg, k) for k in ("init", "epochs_by", "optimizer_state")}}
    extra["finetune"]["distill"] = dataclasses.asdict(cfg.distill)
    role = "scratch" if cfg.init == "scratch" else "sparse" if cfg.sparsity else "finetuned"
    result = {"stage": "finetune", "role": role, "parent": relative(cfg.checkpoint, out), "asked": plain(cfg)}
    with recorded(out, result) as result:
        content = checkpoint.read(cfg.checkpoint)
        record = content["slimming"]
        need(record, cfg.checkpoint, "config", "data")
        recipe = recipe_of(cfg, record)
        recipe.trainer = settled(recipe.trainer, out / LAST)
        result["seed"] = recipe.seed
        torch.manual_seed(recipe.seed)
        data = build_data(recipe.data)
        network = _network(cfg, recipe, content, data)
        if not record["plans"] and rank_zero():
            print(f"{cfg.checkpoint} was never pruned: it is trained further as it is")
        if cfg.epochs_by == "macs":
            dense = checkpoint.architecture(content, cfg.checkpoint, _own(cfg, data), pruned=False)
            _stretch(recipe, dense, network.model, example_of(data))
        network.extra = extra
        network.teacher = _teacher(cfg.distill.teacher, data, _own(cfg, data))
        result["config"] = plain(recipe) | extra
        start = resume_point(cfg.resume, result["config"], out)
        result |= fit(recipe, out, network, data, start)
    return result["metrics"].get("test/acc", math.nan)


def recipe_of(cfg: FinetuneConfig, record: dict) -> TrainConfig:
    """Return the training of a checkpoint's record with the values that are given now.

    Raises:
        CheckpointError: the record names a class that is not known.
        ConfigError: neither the record (of a public port) nor the command line has a recipe.
    """
    before = record["config"]
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
    seed = before.get("seed", 1) if cfg.seed is None else cfg.seed
    if cfg.data.get("seed") is None:
        groups["data"]["seed"] = seed
    taken = {
        k: before.get(k, default) if getattr(cfg, k) is None else getattr(cfg, k)
        for k, default in (("decay_batchnorm", True), ("channels_last", True))
    }
    same = {k: getattr(cfg, k) for k in SAME}
    return TrainConfig(
        model=cfg.model if cfg.model.get("_target_") else before.get("model", {}), seed=seed, **groups, **taken, **same
    )


def fit_schedule(schedule: dict, before: int | None, epochs: int) -> dict:
    """Return a schedule fitted to a number of epochs where it was fitted to that of before."""
    return {k: epochs if k in LENGTHS and v in (None, before) else v for k, v in schedule.items()}


def _heads(data: ImageData) -> dict[str, int]:
    return {"num_classes": data.num_classes, "in_channels": data.in_channels}


def _own(cfg: FinetuneConfig, data: ImageData) -> nn.Module | None:
    """Build the dense network that the command line names, None for the checkpoint's."""
    return build("model", cfg.model, **_heads(data)) if cfg.model.get("_target_") else None


def _network(cfg: FinetuneConfig, recipe: TrainConfig, content: dict, data: ImageData) -> Network:
    """Build the network to train, in train mode, with the checkpoint's weights or fresh ones."""
    record, heads = content["slimming"], _heads(data)
    trained_for = {k: record["data"][k] for k in heads}
    if trained_for != heads:
        raise ConfigError(f"the data have {heads}, {cfg.checkpoint} was trained for {trained_for}")
    for plan in record["plans"]:
        if not plan.get("train_watched", True):
            raise ConfigError(
                f"{cfg.checkpoint} cannot be fine-tuned: the network could not be run in train mode when it was pruned "
                f"({plan.get('train_reason')}), so layers that only run there were not resized; prune it by the library "
                "with slimming.trace(..., train_input=...)"
            )
    dense = _own(cfg, data)
    if cfg.init == "scratch":
        model = checkpoint.architecture(content, cfg.checkpoint, dense)
        # Not with the seed of the training, whose first weights these would be: a lottery ticket, not a scratch.
        torch.manual_seed(mix(recipe.seed, SCRATCH))
        redraw(model, record["model"] if dense is None else model_spec(cfg.model, heads))
    else:
        model = checkpoint.rebuild(content, cfg.checkpoint, dense)
    network = Network(model.train(), record["model"], record["plans"])
    if cfg.optimizer_state:
        network.optimizer_state = _sliced_state(cfg, recipe, record, dense)
    return network


def _sliced_state(cfg: FinetuneConfig, recipe: TrainConfig, record: dict, dense: nn.Module | None) -> dict:
    """Return the optimizer state of the training before the last pruning, sliced as the weights were."""
    path = Path(cfg.checkpoint).parent / (record.get("parent") or "")
    if record.get("stage") != "prune" or not record["plans"] or not path.is_file():
        raise ConfigError(f"optimizer_state=true needs the checkpoint that {cfg.checkpoint} was pruned from, at {path}")
    before = checkpoint.read(path)
    need(before["slimming"], path, "config")
    if not _has_state(before.get("optimizer_states")):
        raise ConfigError(f"optimizer_state=true: {path} holds no optimizer state")
    was, now = (c.get("optimizer", {}).get("_target_") for c in (before["slimming"]["config"], plain(recipe)))
    if was != now:
        raise ConfigError(f"optimizer_state=true: the training used {was}, this one uses {now}")
    wide = checkpoint.architecture(before, path, dense)
    names = [n for _, group in parameter_groups(wide, recipe.decay_batchnorm) for n in group]
    if recipe.decay_batchnorm != before["slimming"]["config"].get("decay_batchnorm", True):
        raise ConfigError("optimizer_state=true needs the decay_batchnorm of the training")
    plan = PruningPlan.from_dict(record["plans"][-1])
    return prune_optimizer_state(before["optimizer_states"][0], wide, plan, names)


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


def _teacher(path: str | None, data: ImageData, own: nn.Module | None) -> nn.Module | None:
    """Load the teacher; `own` is the dense network for one that is not registered."""
    if path is None:
        return None
    content = checkpoint.read(path)
    teacher = checkpoint.rebuild(content, path, None if content["slimming"]["model"] else own)
    try_model(teacher, example_of(data))
    classes = teacher(example_of(data).to(dtype_of(teacher))).shape[1]
    if classes != data.num_classes:
        raise ConfigError(f"distill.teacher={path} knows {classes} classes, the data have {data.num_classes}")
    return teacher
