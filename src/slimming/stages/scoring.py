"""Scores within a pruning: training images for those that are measured."""

import torch
from torch import Tensor

from slimming.channels.options import MEASURED
from slimming.data import ImageData

IMAGES = 2000  # as many as repair=true takes


def scoring_batches(score: str, data: ImageData | None, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Return about IMAGES training images, not augmented and none twice; none for a score that is read off the weights."""
    if score not in MEASURED:
        return []
    assert data is not None
    count = min(-(-IMAGES // data.batch_size), len(data.train_dataloader()))
    return [images.to(dtype) for images in data.training_batches(count, device, augment=False)]
