"""Any tree {train,test}/<class>/<image>: decoded and measured once into a uint8 cache."""

import hashlib
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from slimming.data.base import ImageData, split_off
from slimming.data.image_files import list_images, open_image
from slimming.errors import DataError, check_choice, check_number

CACHE_FORMAT = 1
PARTS = ("train", "test")


class ImageFolder(ImageData):
    """Colour images from `root`/{train,test}/<class>/; normalised by the statistics of the training images."""

    in_channels = 3

    def __init__(
        self,
        root: str | None = None,
        image_size: int | None = None,
        flips: bool = True,
        cache_dir: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs,
    ):
        """List the files; no image is decoded yet.

        Args:
            image_size: the shorter side is resized to it and the middle cut out; None: all images must be squares of
                one size already.
            cache_dir: where the decoded images are kept; None: $XDG_CACHE_HOME/slimming or ~/.cache/slimming.
            mean, std: per channel, in [0, 1], to normalise by; None: those of the training images.

        Raises:
            DataError: as `list_images`.
        """
        super().__init__(**kwargs)
        check_choice("data.flips", flips, (True, False))
        self.flips = flips
        self.classes, listings = list_images(root, PARTS)
        self.root, self.listed = Path(root), dict(zip(PARTS, listings, strict=True))
        self.num_classes = len(self.classes)
        if image_size is None:
            image_size = min(open_image(self.listed["train"].paths()[0]).size)
            self.resize = False
        else:
            check_number("data.image_size", image_size, 1, whole=True)
            self.resize = True
        self.image_size = image_size
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.cache_dir = Path(cache_dir or Path(home) / "slimming")
        self.given = {"mean": mean, "std": std}
        self.normalise_by(mean, std)

    def statistics(self) -> dict:
        return super().statistics() | {"classes": self.classes}

    def prepare_data(self) -> None:
        """Decode what the cache does not hold yet.

        Raises:
            DataError: an image that cannot be read, or is of another size while `image_size` is None.
        """
        for part in PARTS:
            if not self._cache(part).exists():
                self._fill(part)

    def load(self, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
        part = "train" if train else "test"
        try:
            images, labels, moments = self._read(part)
        except Exception:  # the cache is damaged, or of an older version without moments: decode again
            self._fill(part)
            images, labels, moments = self._read(part)
        if train:
            self._measure(moments[split_off(labels, self.val_size)[0]])
        return images, labels

    def _read(self, part: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Read (images, labels, moments) as `_fill` has written them; an exception of any kind if a bit is different."""
        path, side = self._cache(part), self.image_size
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load looks at no checksum
                raise DataError(f"{path} is damaged")
        data = torch.load(path, weights_only=True)
        labels = torch.from_numpy(self.listed[part].labels)
        n, channels = len(labels), self.in_channels
        kinds = {"images": ((n, channels, side, side), torch.uint8), "moments": ((n, 2, channels), torch.float64)}
        if not torch.equal(data["labels"], labels) or any(
            (tuple(data[key].shape), data[key].dtype) != kind or not data[key].is_contiguous()
            for key, kind in kinds.items()
        ):
            raise DataError(f"{path} holds something else")
        return data["images"], data["labels"], data["moments"]

    def _measure(self, moments: torch.Tensor) -> None:
        """Normalise by the mean and deviation of images with these moments (N, 2, C), unless others are given."""
        mean, square = moments.mean(0)
        found = {"mean": mean.tolist(), "std": (square - mean**2).clamp_min(1e-6).sqrt().tolist()}
        self.normalise_by(**{key: self.given[key] or value for key, value in found.items()})

    def _cache(self, part: str) -> Path:
        """Return the file of a part's decoded images, named by a digest of what it depends on."""
        digest = hashlib.sha256(f"{CACHE_FORMAT} {self.image_size} {self.resize}".encode())
        for file in self.listed[part].paths():
            try:
                stat = file.stat()
            except OSError as error:
                raise DataError(f"{file} cannot be read ({error}): mend or remove it") from error
            digest.update(f"{file.parent.name}/{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return self.cache_dir / f"{part}-{digest.hexdigest()[:20]}.pt"

    def _fill(self, part: str) -> None:
        images = decode(self.listed[part].paths(), self.image_size, self.resize, part)  # (N, 3, S, S)
        content = {"images": images, "labels": torch.from_numpy(self.listed[part].labels)}
        content["moments"] = torch.cat([_moments(chunk) for chunk in images.split(256)])
        path = self._cache(part)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".tmp{os.getpid()}")
        try:
            torch.save(content, temporary)
            temporary.replace(path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            temporary.unlink(missing_ok=True)
            raise DataError(f"the image cache {path} cannot be written ({error}): set data.cache_dir") from error


class _Decoded(Dataset):
    def __init__(self, files: list[Path], size: int, resize: bool):
        self.files, self.size, self.resize = files, size, resize

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        """Return (3, S, S) uint8 and "", or zeros and what is wrong: an exception from a worker would lose its type."""
        from torchvision.transforms.v2 import functional as T

        try:
            image = open_image(self.files[index])
            if self.resize:
                image = T.center_crop(T.resize(image, [self.size], antialias=True), [self.size, self.size])
            elif image.size != (self.size, self.size):
                w, h = image.size
                raise DataError(
                    f"{self.files[index]} has {w}x{h} pixels, others {self.size}x{self.size}: set data.image_size"
                )
        except DataError as error:
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), str(error)
        return T.pil_to_tensor(image), ""


def decode(files: list[Path], size: int, resize: bool, title: str) -> torch.Tensor:
    """Decode image files in parallel, with a progress bar, into uint8 (N, 3, size, size).

    Raises:
        DataError: the first file that cannot be used.
    """
    from rich.progress import Progress

    workers = min(8, os.cpu_count() or 1) if len(files) > 2000 else 0
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    done = 0
    with Progress() as progress:
        task = progress.add_task(f"decoding {len(files):,} {title} images", total=len(files))
        for batch, errors in DataLoader(_Decoded(files, size, resize), 256, num_workers=workers):
            if bad := next(filter(None, errors), None):
                raise DataError(bad)
            images[done : done + len(batch)] = batch
            done += len(batch)
            progress.update(task, completed=done)
    return images


def _moments(images: torch.Tensor) -> torch.Tensor:
    """Average pixels and their squares over each of (N, C, H, W) uint8 images, scaled to [0, 1]: (N, 2, C) float64."""
    x = images.double() / 255
    return torch.stack((x.mean((2, 3)), (x * x).mean((2, 3))), 1)
