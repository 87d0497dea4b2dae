"""Boxes of many images in a few arrays, and the checks that every label has to pass."""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from slimming.errors import DataError

OVER_THE_EDGE = 2e-3  # share of the image's side: what tools that round, or count pixels from 1, write


@dataclass(frozen=True)
class BoxList:
    """The images of one part and their boxes; plain arrays, which worker processes share without copying.

    Attributes:
        files: (n,) paths of the images as bytes.
        boxes: (m, 4) float32 corners x1 y1 x2 y2 as shares of the image's width and height, image by image.
        labels: (m,) int64.
        starts: (n + 1,) where the boxes of an image start and the last one's end.
    """

    files: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        return Path(os.fsdecode(self.files[index]))

    def of(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return boxes (n, 4), as shares, and labels (n,) of one image."""
        own = slice(self.starts[index], self.starts[index + 1])
        return torch.from_numpy(self.boxes[own].copy()), torch.from_numpy(self.labels[own].copy())


Box = tuple[int, float, float, float, float]  # label and corners, as shares


def box_list(files: Sequence[Path], boxes: Iterable[Sequence[Box]]) -> BoxList:
    """Put the boxes of every image into arrays."""
    counts, rows = [], []
    for own in boxes:
        counts.append(len(own))
        rows.extend(own)
    table = np.array(rows, dtype=np.float64).reshape(-1, 5)
    names = np.array([os.fsencode(file) for file in files], dtype=np.bytes_)
    starts = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
    return BoxList(names, table[:, 1:].astype(np.float32), table[:, 0].astype(np.int64), starts)


def checked_box(where: str, label: int, corners: Sequence[float], written: str) -> Box:
    """Return a box cut off at the edges of its image.

    Args:
        where: file and line.
        corners: x1 y1 x2 y2 as shares of the image's width and height.
        written: the box as it stands in the file.

    Raises:
        DataError: it reaches outside the image, or has no area.
    """
    if not all(-OVER_THE_EDGE <= value <= 1 + OVER_THE_EDGE for value in corners):  # nan as well
        raise DataError(f"{where}: the box {written} reaches outside the image")
    x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) for value in corners)
    if not (np.float32(x1) < np.float32(x2) and np.float32(y1) < np.float32(y2)):
        raise DataError(f"{where}: the box {written} has no area: mend or remove it")
    return label, x1, y1, x2, y2


def number(where: str, field: object) -> float:
    """Return a finite number; DataError for anything else."""
    try:
        value = math.nan if isinstance(field, bool) else float(field)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{where}: {field!r} is no number")
    return value
