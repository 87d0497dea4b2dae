"""Where the network of a pruning or an export comes from: a checkpoint of ours, or a file of a reference implementation."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from slimming import checkpoint, reference
from slimming.channels import surgery
from slimming.channels.plan import PruningPlan
from slimming.checkpoint import Checkpoint
from slimming.config import ExportConfig, PruneConfig
from slimming.data import ImageData
from slimming.errors import ConfigError, DataError
from slimming.records import Record
from slimming.stages.building import build, build_data, dtype_of, inherit, model_label, model_spec
from slimming.stages.restoring import at_full_width
from slimming.stages.tasks import Task, task_of
from slimming.training.shrinking import shrinks

SourceConfig = PruneConfig | ExportConfig
REFERENCE_SIZE = 32  # pixels of the images of all data sets that reference implementations train on


@dataclass
class DataNeed:
    """Why a stage needs the data: `needs` and how to go `without`, as a message says it."""

    needs: str
    without: str


@dataclass
class Source:
    """The network to prune or to export, in eval mode on the CPU, and the record that it came with.

    Attributes:
        dense: builds the network before its first pruning, with any weights; None where this one is it.
        shrunk: channels left while it trained (`shrink=true`); to be pruned, it has the width from before that, and zeros for
            what has left, so that a share of its channels, or of its cost, is one of the network that the training began with.
    """

    model: nn.Module
    record: Record
    dense: Callable[[], nn.Module] | None = None
    shrunk: bool = False

    @property
    def label(self) -> str:
        return model_label(self.record.model, self.model)

    @property
    def task(self) -> Task:
        return task_of(self.training)

    @property
    def training(self) -> dict[str, Any]:
        """The configuration of its training, {} where that is unknown."""
        return self.record.config or {}

    def exported(self) -> "Source":
        """Return it as other programs get it: its networks with one output that they can use."""
        dense = self.dense
        return replace(
            self, model=self.task.exported(self.model), dense=dense and (lambda: self.task.exported(dense()))
        )

    @property
    def example(self) -> torch.Tensor:
        """One black image, (1, C, H, W), in the network's precision."""
        seen = self.record.data or {}
        return torch.zeros(1, seen["in_channels"], seen["image_size"], seen["image_size"], dtype=dtype_of(self.model))


def load_source(cfg: SourceConfig, need: DataNeed | None) -> tuple[Source, ImageData | None]:
    """Load the network, and its data where there is a need.

    Raises:
        CheckpointError: no checkpoint of ours nor of a known reference implementation.
        DataError: the data are not there.
    """
    weights = reference.read(cfg.checkpoint)
    if weights is not None:
        return _load_reference(cfg, need, weights)
    saved = checkpoint.read(cfg.checkpoint)
    saved.record.need(cfg.checkpoint, "config", "data")
    if saved.record.low_rank and isinstance(cfg, PruneConfig):
        raise ConfigError(f"the layers of {cfg.checkpoint} are split into factors of low rank: prune first, then split")
    return _load_ours(cfg, need, saved)


def _load_ours(cfg: SourceConfig, need: DataNeed | None, saved: Checkpoint) -> tuple[Source, ImageData | None]:
    node = inherit("data", cfg.data, (saved.record.config or {}).get("data"))
    data = _load_data(need, node, "data=<name>")
    _check_classes(cfg, data, saved.record.io_shape)
    record = replace(saved.record, stage="prune", config=(saved.record.config or {}) | {"data": node})
    if data:
        record.data = data.statistics()
    given = _given_network(cfg, task_of(record.config).facts(cfg.model, record.data or {}))
    model = checkpoint.rebuild(saved, given)
    left = shrinks(record.plans) if isinstance(cfg, PruneConfig) else []
    if left:
        record.plans = record.plans[: -len(left)]
        model = at_full_width(_before(saved, given, record.plans), model, left)
    changed = record.plans or record.low_rank
    dense = partial(checkpoint.architecture, saved, given, pruned=False) if changed else None
    return Source(model, record, dense, shrunk=bool(left)), data


def _before(saved: Checkpoint, given: nn.Module | None, plans: list[dict]) -> nn.Module:
    """Build the network that the first plans of a checkpoint lead to."""
    model = checkpoint.architecture(saved, given, pruned=False)
    for plan in plans:
        model = surgery.prune(model, PruningPlan.from_dict(plan), verify=False)
    return model


def _load_reference(
    cfg: SourceConfig, need: DataNeed | None, weights: dict[str, torch.Tensor]
) -> tuple[Source, ImageData | None]:
    data = _load_data(need, cfg.data, "data=cifar10 or another")
    io_shape = reference.io_shape(weights)
    _check_classes(cfg, data, io_shape)
    given = _given_network(cfg, io_shape)
    if given is None:
        raise ConfigError(
            f"{cfg.checkpoint} is of a reference implementation and does not name its network: "
            "give model=vgg19, model=preresnet164, model=densenet40 (there: model.init_channels=24) ..."
        )
    example = torch.zeros(1, io_shape["in_channels"], REFERENCE_SIZE, REFERENCE_SIZE)
    model, plans = reference.convert(weights, given, example, cfg.checkpoint)
    record = Record(model_spec(cfg.model, io_shape), [p.to_dict() for p in plans], "prune", {"data": cfg.data})
    record.data = data.statistics() if data else io_shape | {"image_size": REFERENCE_SIZE}
    return Source(model, record, (lambda: given) if plans else None), data


def _given_network(cfg: SourceConfig, facts: dict[str, int]) -> nn.Module | None:
    """Build the dense network that the command line names, None for the checkpoint's."""
    return build("model", cfg.model, **facts) if cfg.model.get("_target_") else None


def _check_classes(cfg: SourceConfig, data: ImageData | None, io_shape: dict[str, int]) -> None:
    if data and data.num_classes != io_shape["num_classes"]:
        raise ConfigError(
            f"the data have {data.num_classes} classes, {cfg.checkpoint} was trained for {io_shape['num_classes']}"
        )


def _load_data(need: DataNeed | None, node: dict, choice: str) -> ImageData | None:
    """Load the data if they are needed; `choice` is what to give where none are named."""
    if need is None:
        return None
    advice = f"{need.needs} the data: give {{}}, or go without by {need.without}"
    if not node.get("_target_"):
        raise DataError(advice.format(choice))
    try:
        data = build_data(node)
        data.prepare_data()
        data.setup()
    except DataError as error:
        raise DataError(f"{error}; {advice.format('data.root=<folder>')}") from error
    return data
