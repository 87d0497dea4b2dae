"""The quantisation of an export: which images it sees. None of them is a test image."""

import os
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from slimming.config import QuantizeConfig
from slimming.data import ImageData
from slimming.deploy.quantising import Quantised, quantise
from slimming.errors import ConfigError

Batch = tuple[np.ndarray, np.ndarray]
SPLITS = {True: "validation images", False: "training images held out from the calibration"}


def quantise_artefact(cfg: QuantizeConfig, data: ImageData | None, artefact: Path) -> tuple[Quantised, str]:
    """Put an int8 artefact in the place of a float one.

    Returns:
        What was done, and whose images its accuracies are of.
    """
    if data is None:
        raise ConfigError(f"quantize={cfg.to} needs training images to calibrate on: give data=<name>")
    calibration, check = images_for(cfg, data)
    target = artefact.with_name(f"int8-{artefact.name}")
    options = {"max_drop": cfg.max_drop, "reduce_range": cfg.reduce_range, "symmetric": cfg.symmetric}
    found = quantise(artefact, target, calibration, check, **options)
    for written in target.parent.glob(f"{target.stem}.*"):  # OpenVINO's are two files
        os.replace(written, artefact.with_suffix(written.suffix))
    return found, SPLITS["val" in data.splits]


def images_for(cfg: QuantizeConfig, data: ImageData) -> tuple[list[np.ndarray], list[Batch]]:
    """Return batches to calibrate on, and labelled ones to judge by that are not among them; unaugmented on the device.

    Calibration takes at most half of the training batches where the rest must be held out.
    """
    held_out = cfg.max_drop is not None and "val" not in data.splits
    loader = data.train_dataloader()
    loader.sampler.set_epoch(0)
    torch.manual_seed(data.seed)  # of augmentation inside the data set itself
    batches = iter(loader)
    count = min(cfg.batches, max(1, len(loader) // 2)) if held_out else cfg.batches
    calibration = [data.transform(images).numpy() for images, _ in islice(batches, count)]
    check: list[Batch] = []
    if cfg.max_drop is not None:
        left = cfg.check_images
        for images, labels in batches if held_out else data.val_dataloader():
            check.append((data.transform(images[:left]).numpy(), labels[:left].numpy()))
            left -= len(check[-1][1])
            if left <= 0:
                break
    return calibration, check
