"""Repair within a pruning: the thin network's layers refitted on training images."""

import time

import lightning.pytorch as pl
import torch
from torch import nn

from slimming.channels.plan import PruningPlan
from slimming.channels.repair import refit
from slimming.config import RepairConfig
from slimming.data import ImageData
from slimming.records import Result
from slimming.stages.building import dtype_of


def repaired(
    cfg: RepairConfig,
    networks: tuple[nn.Module, nn.Module],
    plan: PruningPlan,
    data: ImageData,
    trainer: pl.Trainer,
    result: Result,
) -> nn.Module:
    """Return the repaired network, on the CPU; say so on the screen and in `result`.

    Args:
        networks: the dense one and the thin one, as `prune` left it.
    """
    device = trainer.strategy.root_device
    wanted = min(cfg.images, len(data.splits["train"]))  # none twice
    count = -(-wanted // data.batch_size)
    images = torch.cat([*data.training_batches(count, device, augment=False)])[:wanted].to(dtype_of(networks[1]))
    dense, thin = (network.to(device) for network in networks)
    begun = time.monotonic()
    found = refit(dense, thin, plan, [images], cfg.ridge)
    seconds = time.monotonic() - begun
    dense.cpu()
    result.details["repair"] = {
        "images": len(images),
        "ridge": cfg.ridge,
        "layers": len(found.layers),
        "left": found.left,
        "seconds": seconds,
    }
    left = "".join(f"; {name} stays as it is: {reason}" for name, reason in found.left.items())
    print(f"repaired: {len(found.layers)} layers refitted on {len(images):,} training images in {seconds:.1f} s{left}")
    return found.model.cpu()
