"""A detector's data for tests: bright squares on noise, two classes by their size, some images without any."""

import lightning.pytorch as pl
import torch
from torch.utils.data import Dataset

from slimming import models
from slimming.data import ImageData

SIDES = (10, 22)  # pixels, by class


class Images(Dataset):
    """uint8 images and their targets, fetched a whole batch at a time."""

    def __init__(self, images: torch.Tensor, targets: list[dict[str, torch.Tensor]]):
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]):
        return self.images[indices], [self.targets[i] for i in indices]


class Squares(ImageData):
    num_classes, in_channels, image_size = 2, 1, 64
    mean, std, flips = (0.3,), (0.2,), False
    class_names = ("small", "large")

    def __init__(self, train: int = 24, test: int = 12, val: int = 0, **kwargs):
        super().__init__(augment=False, **kwargs)
        self.counts = {"train": train, "test": test} | ({"val": val} if val else {})

    def setup(self, stage: str | None = None) -> None:
        generator = torch.Generator().manual_seed(7)
        self.splits = {split: draw(count, generator) for split, count in self.counts.items()}


def draw(count: int, generator: torch.Generator) -> Images:
    images = torch.randint(0, 90, (count, 1, 64, 64), generator=generator, dtype=torch.uint8)
    targets = []
    for number in range(count):
        labels = torch.randint(0, 2, (number % 3,), generator=generator)  # none, one, two
        boxes = []
        for label in labels.tolist():
            side = SIDES[label]
            x, y = torch.randint(0, 64 - side, (2,), generator=generator).tolist()
            images[number, :, y : y + side, x : x + side] = 230
            boxes.append([x, y, x + side, y + side])
        targets.append({"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "labels": labels})
    return Images(images, targets)


def small_detector(width: float = 1 / 16) -> torch.nn.Module:
    torch.manual_seed(0)
    return models.yolov3_tiny(width=width, num_classes=2, in_channels=1, image_size=64)


def make_trainer(**kwargs) -> pl.Trainer:
    fixed = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    fixed |= {"enable_model_summary": False, "use_distributed_sampler": False, "devices": 1, "max_epochs": 1}
    return pl.Trainer(**fixed | kwargs)
