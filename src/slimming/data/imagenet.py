"""Image folders too large for memory, ImageNet first of all: decoded by workers while the network trains."""

import os
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from slimming.data.base import ImageData, split_off
from slimming.data.image_files import Listing, list_images, open_image
from slimming.data.sampler import mix
from slimming.errors import check_number


class FileImages(Dataset):
    """Images decoded when they are asked for.

    An item's number is epoch * n + index, so that its augmentation is a function of seed, epoch and image.
    """

    def __init__(
        self, files: np.ndarray, labels: np.ndarray, size: int, resize: int, augment: bool, flips: bool, seed: int
    ):
        self.files, self.labels, self.size, self.resize, self.seed = files, labels, size, resize, seed
        self.augment, self.flips = augment, flips

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        """Return (3, S, S) uint8 and the class."""
        epoch, index = divmod(number, len(self.files))
        image = open_image(Path(os.fsdecode(self.files[index])))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix(self.seed, epoch, index))
            return self._view(image), int(self.labels[index])

    def _view(self, image) -> torch.Tensor:
        from torchvision.transforms import v2

        if self.augment:
            steps = [v2.RandomResizedCrop(self.size, antialias=True)] + [v2.RandomHorizontalFlip()] * self.flips
        else:
            steps = [v2.Resize(self.resize, antialias=True), v2.CenterCrop(self.size)]
        return v2.Compose([*steps, v2.PILToTensor()])(image)


class ImageNet(ImageData):
    """Colour images from `root`/{train,val}/<class>/ at `image_size` pixels; only file names are kept in memory.

    Training: random resized crops and flips; evaluation: the shorter side resized to `image_size` * 256 / 224 and the middle
    cut out (the recipe of the torchvision references). Both run in `num_workers` processes; normalising on the device.
    """

    collate = staticmethod(default_collate)
    index_by_epoch = True
    in_channels = 3
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(
        self,
        root: str | None = None,
        image_size: int = 224,
        flips: bool = True,
        num_workers: int | None = None,
        **kwargs,
    ):
        """List the files; no image is decoded.

        Args:
            num_workers: decoding processes of every rank; None: one per CPU core that this rank has.

        Raises:
            DataError: as `list_images`.
        """
        super().__init__(**kwargs)
        check_number("data.image_size", image_size, 1, whole=True)
        if num_workers is not None:
            check_number("data.num_workers", num_workers, 0, whole=True)
        self.image_size, self.flips, self.num_workers = image_size, flips, num_workers
        only_test = root is not None and (Path(root) / "test").is_dir() and not (Path(root) / "val").is_dir()
        self.classes, listings = list_images(root, ("train", "test" if only_test else "val"))
        self.listed: dict[str, Listing] = dict(zip(("train", "test"), listings, strict=True))
        self.num_classes = len(self.classes)

    def statistics(self) -> dict:
        return super().statistics() | {"classes": self.classes}

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        train, test = self.listed["train"], self.listed["test"]
        rest, held = split_off(torch.from_numpy(train.labels), self.val_size)
        self.check_enough(len(rest))
        self.splits = {"train": self._images(train.files[rest], train.labels[rest], self.augment)}
        if len(held):
            self.splits["val"] = self._images(train.files[held], train.labels[held], False)
        self.splits["test"] = self._images(test.files, test.labels, False)

    def _images(self, files: np.ndarray, labels: np.ndarray, augment: bool) -> FileImages:
        return FileImages(
            files, labels, self.image_size, round(self.image_size * 256 / 224), augment, self.flips, self.seed
        )

    def workers(self) -> int:
        world = self.trainer.world_size if self.trainer else 1
        return max(1, (os.cpu_count() or 1) // world) if self.num_workers is None else self.num_workers

    def transform(self, images: torch.Tensor, augment: bool = False) -> torch.Tensor:
        return super().transform(images, augment=False)  # the workers have augmented them
