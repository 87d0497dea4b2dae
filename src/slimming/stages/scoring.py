"""Scores within a pruning: training images for those that are measured."""

from typing import Any

import torch

from slimming.channels.options import MEASURED
from slimming.data import ImageData

IMAGES = 2000  # as many as repair=true takes


def scoring_batches(score: str, data: ImageData | None, device: torch.device, dtype: torch.dtype) -> list[Any]:
    """Return about IMAGES training images, not augmented and none twice, with their labels; none for a score of the weights."""
    if score not in MEASURED:
        return []
    assert data is not None
    count = min(-(-IMAGES // data.batch_size), len(data.train_dataloader()))
    return [(images.to(dtype), labels) for images, labels in data.labelled_batches(count, device, augment=False)]
