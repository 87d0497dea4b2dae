"""From the values of a configuration to objects, with one clear error where a value does not fit."""

import functools
import inspect
import json
from typing import Any

import hydra
import lightning.pytorch as pl
import torch
from hydra.errors import InstantiationException
from torch import nn

from slimming import data as datasets
from slimming import models
from slimming.channels.cost import Cost, cost
from slimming.data import ImageData
from slimming.errors import CheckpointError, ConfigError, SlimmingError


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


def build_trainer(node: dict, **objects: Any) -> pl.Trainer:
    """Build a Trainer; `objects` (callbacks, loggers) are handed over as they are, without OmegaConf looking into them."""
    factory = build("trainer", node, _partial_=True)
    try:
        return factory(**objects)
    except SlimmingError:
        raise
    except Exception as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error


def build_data(node: dict) -> ImageData:
    """Build a data module; the same description gives the same one again, so that a sweep loads its data once."""
    return _last_data(json.dumps(node, sort_keys=True))


@functools.lru_cache(maxsize=1)
def _last_data(description: str) -> ImageData:
    return build("data", json.loads(description))


def takes(node: dict, argument: str) -> bool:
    """Return whether the factory of a group has an argument of that name; a group that names none is refused elsewhere."""
    try:
        return argument in inspect.signature(hydra.utils.get_object(node["_target_"])).parameters
    except Exception:
        return False


def model_spec(node: dict, facts: dict[str, int]) -> dict | None:
    """Return {name, arguments} of a registered model, None for another class.

    Args:
        facts: what the factory is told of the data, {num_classes, in_channels ...}.
    """
    name = node["_target_"].removeprefix("slimming.models.")
    if name not in models.REGISTRY:
        return None
    return models.spec(name, {k: v for k, v in node.items() if not k.startswith("_")} | facts)


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


def dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def example_of(data: ImageData) -> torch.Tensor:
    """Return one black image of the data set, (1, C, H, W)."""
    return torch.zeros(1, data.in_channels, data.image_size, data.image_size)


def shape_of(data: ImageData) -> dict[str, int]:
    """Return {num_classes, in_channels, image_size}: what is known of a data set before its images are read."""
    return {key: getattr(data, key) for key in ("num_classes", "in_channels", "image_size")}


def inherit(group: str, given: dict, recorded: dict | None) -> dict:
    """Return a checkpoint's group with the values that are given now; a given `_target_` replaces it whole.

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
    return recorded | given


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
