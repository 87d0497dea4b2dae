"""What all data modules share: splits, loaders, augmentation."""

from collections.abc import Iterator, Sequence

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Subset

from slimming.data.augment import normalise, random_crop, random_flip
from slimming.data.sampler import EpochSampler, TensorImages, mix
from slimming.errors import ConfigError, DataError, check_choice, check_number

SPLIT_SEED = 0  # the validation split is the same for every seed of an experiment


def _as_is(batch):
    return batch


class ImageData(LightningDataModule):
    """A classification data set held in memory as uint8.

    A subclass sets the attributes below (on the class or before `setup`) and gives `load`; `prepare_data` downloads.

    Attributes:
        num_classes, in_channels, image_size: of what the network gets, (N, in_channels, image_size, image_size).
        mean, std: per channel, in [0, 1].
        flips: whether a mirrored image is still of its class.
        collate: makes a batch of what the data set gives; here that is one already.
        index_by_epoch: as in EpochSampler.
    """

    collate = staticmethod(_as_is)
    index_by_epoch = False

    num_classes: int
    in_channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flips: bool

    def __init__(
        self,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        val_size: float = 0,
        augment: bool = True,
        crop: int = 4,
        pad: str = "mean",
        seed: int = 0,
    ):
        """Check the values; nothing is read yet.

        Args:
            batch_size: training images per optimizer step, over all devices.
            val_size: training images held out, stratified: a share in (0, 1), a number >= 1, or 0 for none.
            augment: crop and, where the data allow it, flip the training images.
            crop: pixels of padding before a random crop; 0 crops nothing.
            pad: colour of that padding, `mean` (0 after normalisation: the original code) or `black` (the PyTorch reference
                implementations).
            seed: of the order of the training images and of their augmentation.
        """
        super().__init__()
        check_number("data.batch_size", batch_size, 1, whole=True)
        check_number("data.eval_batch_size", eval_batch_size, 1, whole=True)
        check_number("data.val_size", val_size, 0, whole=val_size >= 1 if isinstance(val_size, float) else False)
        check_number("data.crop", crop, 0, whole=True)
        check_choice("data.augment", augment, (True, False))
        check_choice("data.pad", pad, ("mean", "black"))
        self.batch_size, self.eval_batch_size, self.val_size = batch_size, eval_batch_size, val_size
        self.augment, self.crop, self.pad, self.seed = augment, crop, pad, seed
        self.splits: dict[str, TensorImages] = {}

    def normalise_by(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        """Set the mean and the standard deviation, per channel, in [0, 1]; None leaves what is there.

        Raises:
            ConfigError: another number of channels, or a value out of range.
        """
        for key, value in (("mean", mean), ("std", std)):
            if value is None:
                continue
            if len(value) != self.in_channels:
                raise ConfigError(
                    f"data.{key} must hold {self.in_channels} numbers, one per channel, got {list(value)}"
                )
            for number in value:
                check_number(f"each of data.{key}", number, 0, 1, above=key == "std")
            setattr(self, key, tuple(value))

    def load(self, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return uint8 images (N, C, H, W) and integer labels (N,) of one part."""
        raise NotImplementedError

    def statistics(self) -> dict:
        """Return what a network needs to know of the data, as plain values; part of every checkpoint."""
        keys = ("num_classes", "in_channels", "image_size", "mean", "std")
        return {k: list(v) if isinstance(v := getattr(self, k), tuple) else v for k in keys}

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        images, labels = self.load(train=True)
        train, val = split_off(labels, self.val_size)
        parts = {"train": (images, labels), "test": self.load(train=False)}
        if len(val):
            parts |= {"train": (images[train], labels[train]), "val": (images[val], labels[val])}
        self.check_enough(len(parts["train"][1]))
        self.splits = {name: TensorImages(x, y.long()) for name, (x, y) in parts.items()}

    def check_enough(self, count: int) -> None:
        """Raise ConfigError unless `count` training images fill a batch."""
        if count < self.batch_size:
            raise ConfigError(f"data.batch_size={self.batch_size} is more than the {count} training images there are")

    def train_dataloader(self) -> DataLoader:
        return self._loader("train", self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """The validation split if there is one, else the test set (reported, never selected on)."""
        return self._loader("val" if "val" in self.splits else "test", self.eval_batch_size)

    def test_dataloader(self) -> DataLoader:
        return self._loader("test", self.eval_batch_size)

    def first(self, split: str, count: int):
        """Return the first images of a split as a batch, at most `count`: the same ones on every rank."""
        part = Subset(self.splits[split], range(min(count, len(self.splits[split]))))
        return next(iter(DataLoader(part, count, collate_fn=self.collate, generator=torch.Generator())))

    def _loader(self, split: str, batch_size: int, shuffle: bool = False) -> DataLoader:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if shuffle and batch_size % world:
            raise ConfigError(
                f"data.batch_size={batch_size} must be a multiple of the {world} devices: it is shared out"
            )
        size = batch_size // world if shuffle else batch_size
        sampler = EpochSampler(len(self.splits[split]), shuffle=shuffle, seed=self.seed, rank=rank, world_size=world)
        sampler.index_by_epoch = self.index_by_epoch
        last_is_one_image = shuffle and len(sampler) % size == 1  # no variance for BatchNorm to normalise with
        return DataLoader(
            self.splits[split],
            size,
            sampler=sampler,
            drop_last=last_is_one_image,
            collate_fn=self.collate,
            num_workers=self.workers(),
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else every new iterator draws from the generator of the augmentation
        )

    def workers(self) -> int:
        """Return how many processes fetch the batches of a rank; 0: the rank itself."""
        return 0

    def seed_epoch(self, epoch: int) -> None:
        """Seed torch for one epoch of this rank: augmentation and dropout then do not depend on how one got there."""
        torch.manual_seed(mix(self.seed, epoch, self.trainer.global_rank + 1))

    def on_after_batch_transfer(self, batch, dataloader_idx: int):
        images, labels = batch  # uint8 (N, C, H, W), (N,)
        if self.trainer is None:
            return self.transform(images), labels
        images = self.transform(images, augment=self.augment and self.trainer.training)
        return images.to(self.trainer.lightning_module.dtype), labels

    def transform(self, images: torch.Tensor, augment: bool = False) -> torch.Tensor:
        """Normalise uint8 images (N, C, H, W); crop and flip them, too, with `augment`."""
        mean, std = (torch.tensor(v, device=images.device) for v in (self.mean, self.std))
        images = normalise(images, mean, std)
        if augment and self.crop:
            images = random_crop(images, self.crop, 0 * mean if self.pad == "mean" else -mean / std)
        if augment and self.flips:
            images = random_flip(images)
        return images

    def training_batches(self, count: int, device: torch.device, augment: bool = True) -> Iterator[torch.Tensor]:
        """Yield `count` batches (N, C, H, W) of training images as a training sees them, the same ones each time.

        Args:
            augment: whether images that are augmented on the device are augmented here, too.
        """
        loader = self.train_dataloader()
        for number in range(count):
            epoch, position = divmod(number, len(loader))
            if position == 0:
                torch.manual_seed(mix(self.seed, epoch))
                loader.sampler.set_epoch(epoch)
                batches = iter(loader)
            yield self.transform(next(batches)[0].to(device), self.augment and augment)


def split_off(labels: torch.Tensor, size: float, key: str = "data.val_size") -> tuple[torch.Tensor, torch.Tensor]:
    """Split 0 ... n-1 into (rest, held out), each class by its share; both sorted.

    Args:
        labels: (n,) integers.
        size: share in (0, 1) or number >= 1 of indices to hold out; 0 for none.
        key: of the option that says so.

    Raises:
        ConfigError: so many that a class would have none left, or fewer than there are classes.
    """
    n = len(labels)
    wanted = round(size * n) if size < 1 else int(size)
    if not wanted:
        return torch.arange(n), torch.arange(0)
    classes, counts = labels.unique(return_counts=True)
    if not len(classes) <= wanted <= n - len(classes):
        each = f" of each of the {len(classes)} classes" if len(classes) > 1 else ""
        raise ConfigError(
            f"{key}={size} would hold out {wanted} of {n} training images; there must be at least one{each} on either side"
        )
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    quota = counts * wanted / n
    take = quota.floor().long()
    take[(quota - take).sort(descending=True, stable=True).indices[: wanted - int(take.sum())]] += 1
    held = torch.zeros(n, dtype=torch.bool)
    for label, number in zip(classes, take, strict=True):
        members = (labels == label).nonzero().flatten()
        held[members[torch.randperm(len(members), generator=generator)[:number]]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def check_labels(where: str, labels: torch.Tensor, num_classes: int) -> None:
    """Raise DataError unless all labels are in 0 ... num_classes-1."""
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(f"{where}: labels must lie in 0 ... {num_classes - 1}; the files seem damaged, remove them")
