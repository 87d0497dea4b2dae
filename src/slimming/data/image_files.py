"""Trees <root>/<part>/<class>/<image>: which files there are, and one of them opened."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from slimming.errors import DataError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Listing:
    """The images of one part, class by class, sorted within each.

    Attributes:
        files: (n,) paths as bytes; one array, which worker processes share without copying.
        labels: (n,) int64.
    """

    files: np.ndarray
    labels: np.ndarray

    def paths(self) -> list[Path]:
        return [Path(os.fsdecode(file)) for file in self.files]


def list_images(root: str | None, parts: Sequence[str]) -> tuple[list[str], list[Listing]]:
    """Return the class names, sorted, and the images of each part; no image is opened.

    Args:
        parts: folders below `root`, the training images first: `train`, `test`.

    Raises:
        DataError: no such folder, parts with different classes, fewer than two classes, a class without images.
    """
    layout = " and ".join(f"<root>/{part}/<class>/" for part in parts)
    if root is None:
        raise DataError(f"data.root must name a folder that holds {layout.replace('<root>/', '')}")
    folders = [Path(root) / part for part in parts]
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"data.root: {folder} is not there; the layout is {layout}")
    classes = [_class_names(folder) for folder in folders]
    for part, names in zip(parts[1:], classes[1:], strict=True):
        if names != classes[0]:
            train, other = (sorted(set(a) - set(b))[:5] for a, b in ((classes[0], names), (names, classes[0])))
            raise DataError(
                f"data.root={root}: {parts[0]} and {part} must hold the same classes; "
                f"only in {parts[0]}: {train}, only in {part}: {other}"
            )
    if len(classes[0]) < 2:
        raise DataError(f"data.root={root}: at least two classes are needed, found {classes[0]} in {folders[0]}")
    return classes[0], [_list_part(folder, classes[0]) for folder in folders]


def _class_names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _list_part(folder: Path, classes: list[str]) -> Listing:
    files, counts = [], []
    for name in classes:
        found = sorted(
            os.fsencode(entry.path)
            for entry in os.scandir(folder / name)
            if os.path.splitext(entry.name)[1].lower() in EXTENSIONS
        )
        files.append(np.array(found, dtype=np.bytes_))
        counts.append(len(found))
    if empty := [f"{folder.name}/{name}" for name, count in zip(classes, counts, strict=True) if not count]:
        kinds = ", ".join(sorted(EXTENSIONS))
        raise DataError(f"data.root={folder.parent}: no images ({kinds}) in {', '.join(empty[:5])}")
    return Listing(np.concatenate(files), np.repeat(np.arange(len(classes)), counts))


def open_image(file: Path, upright: bool = False) -> Image.Image:
    """Open an image as RGB, turned as its EXIF data say if it is to be `upright`; DataError if it cannot be read."""
    try:
        with Image.open(file) as image:
            return (ImageOps.exif_transpose(image) if upright else image).convert("RGB")
    except Exception as error:  # a broken file can raise nearly anything in a decoder
        raise DataError(f"{file} cannot be read as an image ({error}): mend or remove it") from error
