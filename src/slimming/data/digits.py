"""Handwritten digits that come with the package: nothing to download."""

from importlib import resources

import numpy as np
import torch
from torch.nn import functional as F

from slimming.data.base import ImageData
from slimming.errors import check_number


def read_digits(train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return grey values 0 to 16 (N, 8, 8) and classes (N,) of one part."""
    with np.load(resources.files("slimming.data").joinpath("digits.npz")) as file:
        images, labels = file["images"], file["labels"]
    part = (np.arange(len(images)) % 5 != 4) == train
    return images[part], labels[part]


class Digits(ImageData):
    """1,797 grey 8x8 digits (UCI, CC BY 4.0, see digits.md), enlarged to `image_size`; every fifth is a test image."""

    num_classes = 10
    in_channels = 1
    mean = (0.306,)  # of the 1,438 training images at 32x32
    std = (0.324,)
    flips = False

    def __init__(self, image_size: int = 32, crop: int = 2, **kwargs):
        super().__init__(crop=crop, **kwargs)
        check_number("data.image_size", image_size, 8, whole=True)
        self.image_size = image_size

    def load(self, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = map(torch.from_numpy, read_digits(train))
        grey = images[:, None].float() * (255 / 16)  # (N, 1, 8, 8)
        grey = F.interpolate(grey, (self.image_size, self.image_size), mode="bilinear", align_corners=False)
        return grey.round().to(torch.uint8), labels.long()
