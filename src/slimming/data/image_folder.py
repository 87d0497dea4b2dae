"""Any tree {train,test}/<class>/<image>: decoded and measured once into a uint8 cache."""

import hashlib
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from slimming.data.base import ImageData, split_off
from slimming.errors import DataError, check_choice, check_number

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
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
            DataError: no such folder, fewer than two classes, a class without images, parts with other classes.
        """
        super().__init__(**kwargs)
        check_choice("data.flips", flips, (True, False))
        if root is None:
            raise DataError("data.root must name a folder that holds train/<class>/ and test/<class>/")
        self.root, self.flips = Path(root), flips
        self.files = {part: list_images(self.root / part) for part in PARTS}
        self.classes = sorted(self.files["train"])
        _check_classes(self.root, self.files)
        self.num_classes = len(self.classes)
        if image_size is None:
            image_size = min(open_image(self.files["train"][self.classes[0]][0]).size)
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
        except Exception:  # a cache of the user's disk trouble, or without moments: decode again
            self._fill(part)
            images, labels, moments = self._read(part)
        if train:
            self._measure(moments[split_off(labels, self.val_size)[0]])
        return images, labels

    def _read(self, part: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Read the cache; an exception of any kind if it is not, to the last bit, what `_fill` has written."""
        path, side = self._cache(part), self.image_size
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load looks at no checksum
                raise DataError(f"{path} is damaged")
        data = torch.load(path, weights_only=True)
        labels = torch.tensor([i for i, name in enumerate(self.classes) for _ in self.files[part][name]])
        n, channels = len(labels), self.in_channels
        kinds = {"images": ((n, channels, side, side), torch.uint8), "moments": ((n, 2, channels), torch.float64)}
        if not torch.equal(data["labels"], labels) or any(
            (tuple(data[key].shape), data[key].dtype) != kind or not data[key].is_contiguous()
            for key, kind in kinds.items()
        ):
            raise DataError(f"{path} holds something else")
        return data["images"], data["labels"], data["moments"]

    def _measure(self, moments: torch.Tensor) -> None:
        mean, square = moments.mean(0)
        found = {"mean": mean.tolist(), "std": (square - mean**2).clamp_min(1e-6).sqrt().tolist()}
        self.normalise_by(**{key: self.given[key] or value for key, value in found.items()})

    def _cache(self, part: str) -> Path:
        digest = hashlib.sha256(f"{CACHE_FORMAT} {self.image_size} {self.resize}".encode())
        for name in self.classes:
            for file in self.files[part][name]:
                try:
                    stat = file.stat()
                except OSError as error:
                    raise DataError(f"{file} cannot be read ({error}): mend or remove it") from error
                digest.update(f"{name}/{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return self.cache_dir / f"{part}-{digest.hexdigest()[:20]}.pt"

    def _fill(self, part: str) -> None:
        pairs = [(file, label) for label, name in enumerate(self.classes) for file in self.files[part][name]]
        images = decode([file for file, _ in pairs], self.image_size, self.resize, part)
        content = {"images": images, "labels": torch.tensor([label for _, label in pairs])}
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


def list_images(folder: Path) -> dict[str, list[Path]]:
    """Return the image files of every class folder, sorted.

    Raises:
        DataError: no such folder.
    """
    if not folder.is_dir():
        raise DataError(
            f"data.root: {folder} is not there; the layout is <root>/train/<class>/ and <root>/test/<class>/"
        )
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return {c.name: sorted(f for f in c.iterdir() if f.suffix.lower() in EXTENSIONS) for c in classes}


def _check_classes(root: Path, files: dict[str, dict[str, list[Path]]]) -> None:
    train, test = (set(files[part]) for part in PARTS)
    if train != test:
        raise DataError(
            f"data.root={root}: train and test must hold the same classes; only in train: {sorted(train - test)}, "
            f"only in test: {sorted(test - train)}"
        )
    if len(train) < 2:
        raise DataError(f"data.root={root}: at least two classes are needed, found {sorted(train)} in {root}/train")
    empty = [f"{part}/{name}" for part in PARTS for name, found in files[part].items() if not found]
    if empty:
        raise DataError(f"data.root={root}: no images ({', '.join(sorted(EXTENSIONS))}) in {', '.join(empty)}")


def open_image(file: Path) -> Image.Image:
    """Open an image as RGB; DataError if it cannot be read."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except Exception as error:  # a broken file can raise nearly anything in a decoder
        raise DataError(f"{file} cannot be read as an image ({error}): mend or remove it") from error


class _Decoded(Dataset):
    def __init__(self, files: list[Path], size: int, resize: bool):
        self.files, self.size, self.resize = files, size, resize

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        """Return (3, S, S) uint8 and "", or zeros and what is wrong: an exception would lose its type on the way."""
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
