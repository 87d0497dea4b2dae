"""What the data modules of object detection share: batches of images and boxes, augmentation that moves both."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch.utils.data import Dataset

from slimming.data.base import ImageData, split_off
from slimming.data.sampler import mix
from slimming.errors import ConfigError, check_choice, check_number

Target = dict[str, torch.Tensor]  # boxes: (n, 4) float, corners x1 y1 x2 y2 in pixels; labels: (n,) int64


class Source(Protocol):
    """Images of the network's size with their boxes: (3, S, S) uint8, (n, 4) float32 corners in pixels, (n,) int64."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


def collate(items: Sequence[tuple[torch.Tensor, Target]]) -> tuple[torch.Tensor, list[Target]]:
    """Make a batch: images (N, 3, S, S), and a list of targets, since every image has its own number of boxes."""
    images, targets = zip(*items, strict=True)
    return torch.stack(images), list(targets)


class Views(Dataset):
    """Some images of a source, mirrored and recoloured at random in training.

    An item's number is epoch * n + position, so that its augmentation is a function of seed, epoch and position.
    """

    def __init__(self, source: Source, indices: torch.Tensor, seed: int, flips: bool = False, jitter: float = 0):
        from torchvision.transforms import v2

        self.source, self.indices, self.seed = source, indices, seed
        steps = [v2.ColorJitter(jitter, jitter, jitter, jitter / 20)] if jitter else []  # hues tell classes apart
        steps += [v2.RandomHorizontalFlip()] if flips else []
        self.augmentation = v2.Compose(steps) if steps else None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, Target]:
        """Return (3, S, S) uint8 and its target."""
        epoch, position = divmod(number, len(self))
        image, boxes, labels = self.source[int(self.indices[position])]
        if self.augmentation is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(mix(self.seed, epoch, position))
                image, boxes = self._augmented(image, boxes)
        return image, {"boxes": boxes, "labels": labels}

    def _augmented(self, image: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from torchvision import tv_tensors

        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(image.shape[1:]))
        image, boxes = self.augmentation(tv_tensors.Image(image), boxes)
        return image.as_subclass(torch.Tensor), boxes.as_subclass(torch.Tensor)


class DetectionData(ImageData):
    """Images with boxes. A batch is (images, targets).

    Images are (N, 3, S, S), uint8 until they are normalised on the device. Targets are N dicts in torchvision's convention:
    `boxes` (n, 4) float32 corners x1 y1 x2 y2 in pixels of the network's input, and `labels` (n,) int64 from 0; n may be 0.
    A subclass sets `num_classes` and `class_names` and gives `sources`.

    Attributes:
        class_names: by label.
        test_size: training images held out as the test set where the data have none: a share or a number.
    """

    collate = staticmethod(collate)
    index_by_epoch = True
    in_channels = 3
    class_names: list[str]
    test_size: float = 0

    def __init__(
        self,
        image_size: int,
        flips: bool,
        jitter: float,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        val_size: float = 0,
        augment: bool = True,
        pad: str = "mean",
        seed: int = 0,
    ):
        """Check the values; nothing is read yet.

        Args:
            image_size: height and width of the network's input.
            flips: mirror half of the training images left to right.
            jitter: change brightness, contrast and saturation of training images by factors in 1 - jitter ... 1 + jitter.
            mean, std: per channel, in [0, 1], to normalise by; None: those of the class.
            pad: colour of the bars beside an image that is no square, `mean` or `black`.
        """
        super().__init__(batch_size, eval_batch_size, val_size, augment, crop=0, pad=pad, seed=seed)
        check_number("data.image_size", image_size, 8, whole=True)
        check_choice("data.flips", flips, (True, False))
        check_number("data.jitter", jitter, 0, 1)
        self.image_size, self.flips, self.jitter = image_size, flips, jitter
        self.normalise_by(mean, std)

    def sources(self) -> dict[str, Source]:
        """Return the images by part: `train`, and where there are any, `val` and `test`."""
        raise NotImplementedError

    def statistics(self) -> dict:
        return super().statistics() | {"classes": self.class_names}

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        sources = self.sources()
        if "val" in sources and self.val_size:
            raise ConfigError(f"data.val_size={self.val_size} and the validation part of the data exclude each other")
        rest, splits = torch.arange(len(sources["train"])), {}
        for name, size in (("test", self.test_size), ("val", self.val_size)):
            if name in sources:
                splits[name] = Views(sources[name], torch.arange(len(sources[name])), self.seed)
                continue
            left, held = split_off(torch.zeros(len(rest), dtype=torch.long), size, f"data.{name}_size")
            if len(held):
                splits[name] = Views(sources["train"], rest[held], self.seed)
            rest = rest[left]
        self.check_enough(len(rest))
        augmentation = {"flips": self.flips, "jitter": self.jitter} if self.augment else {}
        self.splits = {"train": Views(sources["train"], rest, self.seed, **augmentation)} | splits

    def fill(self) -> list[int]:
        """Return the colour beside an image, 0 to 255 per channel."""
        return [round(255 * value) if self.pad == "mean" else 0 for value in self.mean]

    def transform(self, images: torch.Tensor, augment: bool = False) -> torch.Tensor:
        """Normalise uint8 images (N, 3, S, S); they are augmented already, together with their boxes."""
        return super().transform(images, augment=False)
