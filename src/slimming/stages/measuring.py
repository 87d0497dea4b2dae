"""What networks give and cost: the task's metrics, latency, bytes; and how that reads."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from slimming.channels.cost import latency_ms
from slimming.data import ImageData
from slimming.stages.tasks import Task


def scores(task: Task, trainer: pl.Trainer, model: nn.Module, data: ImageData) -> tuple[dict[str, float], int]:
    """Return the task's metrics, each in [0, 1], on the test images and where there is one on the validation split.

    Returns:
        {test/acc, val/acc}, or of detectors {test/map50, test/map ...}; and how many images were tested.
    """
    module = task.module(model, data.num_classes, optimizer=None)
    found: dict[str, float] = {}
    for results in (
        trainer.test(module, datamodule=data, verbose=False),
        trainer.validate(module, datamodule=data, verbose=False) if "val" in data.splits else [],
    ):
        found |= results[0] if results else {}
    return task.measured(found, "test", "val"), module.evaluated.get("test", 0)


def latencies(
    models: dict[str, nn.Module], images: torch.Tensor, trainer: pl.Trainer, channels_last: bool
) -> dict[str, Any]:
    """Time networks in turns on the trainer's device and in its precision; they are on the CPU afterwards.

    Args:
        models: by name.
        images: (N, C, H, W), one forward pass.

    Returns:
        The median of 15 passes of each, in milliseconds, by name; and batch, device, precision.
    """
    device = trainer.strategy.root_device
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = images.to(device, memory_format=layout)

    def pass_of(model: nn.Module):
        model = model.to(device, memory_format=layout).eval() if channels_last else model.to(device).eval()
        return lambda: model(images)

    with trainer.precision_plugin.forward_context():
        times = latency_ms({name: pass_of(model) for name, model in models.items()}, device)
    for model in models.values():
        model.cpu()
    where = f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
    return times | {"batch": len(images), "device": where, "precision": trainer.precision}


def weight_bytes(model: nn.Module) -> int:
    """Count the bytes of all parameters and buffers that a checkpoint holds."""
    return sum(v.numel() * v.element_size() for v in model.state_dict().values())


def uncounted(cost: dict) -> str:
    """Say what a cost in result.json leaves out: ` (not counted: cdist in head)`, "" if nothing."""
    return f" (not counted: {', '.join(cost['uncounted'])})" if cost.get("uncounted") else ""
