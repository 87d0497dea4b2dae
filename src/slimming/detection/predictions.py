"""The raw outputs of a YOLOv3 as one list of predictions, and the boxes that they stand for.

Source: Redmon and Farhadi, YOLOv3: An Incremental Improvement, arXiv:1804.02767, section 2.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NUMBERS = 5  # of a prediction beside its classes: t_x, t_y, t_w, t_h, t_o
LARGEST_EXPONENT = 8.0  # of a box's width and height in its prior's: 2981 times as wide, where exp would overflow

Priors = Sequence[Sequence[tuple[float, float]]]  # per scale: widths and heights in pixels


@dataclass
class Predictions:
    """The predictions of all scales, P per image: scale after scale, in each prior after prior, row after row.

    Attributes:
        centre: (N, P, 2) logits of the place within the cell.
        extent: (N, P, 2) logarithms of width and height over the prior's.
        objectness: (N, P) logits.
        classes: (N, P, C) logits.
        cells: (P, 2) column and row of the cell.
        priors: (P, 2) width and height of the prior, in pixels.
        strides: (P, 1) pixels per cell.
        starts: (K,) number of the first prediction of each of the K priors of all scales.
        grids: (K, 2) rows and columns of its scale.
    """

    centre: Tensor
    extent: Tensor
    objectness: Tensor
    classes: Tensor
    cells: Tensor
    priors: Tensor
    strides: Tensor
    starts: Tensor
    grids: Tensor

    def boxes(self) -> Tensor:
        """Return the boxes (N, P, 4) in pixels: b = sigmoid(t) + cell for the centre, prior * exp(t) for the extent."""
        centre = (self.centre.sigmoid() + self.cells) * self.strides
        half = self.priors * self.extent.clamp(max=LARGEST_EXPONENT).exp() / 2
        return torch.cat((centre - half, centre + half), -1)

    def scores(self) -> Tensor:
        """Return the confidence (N, P, C) in [0, 1]: that there is an object, and of which class."""
        return self.objectness.sigmoid()[..., None] * self.classes.sigmoid()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        rows, columns = (self.grids[-1] * int(self.strides[-1])).tolist()
        return rows, columns


def predictions(outputs: Sequence[Tensor], priors: Priors, strides: Sequence[int]) -> Predictions:
    """Read the raw outputs of a network, in float32 at least: exp and log in half precision would cost accuracy.

    Args:
        outputs: per scale (N, A * (5 + C), rows, columns), the numbers of a prior side by side.
        priors: per scale the A priors.
        strides: pixels per cell of every scale.
    """
    scales = [
        _of_scale(output.float() if output.dtype in (torch.float16, torch.bfloat16) else output, own, stride)
        for output, own, stride in zip(outputs, priors, strides, strict=True)
    ]
    numbers = torch.cat([scale[0] for scale in scales], 1)  # (N, P, 5 + C)
    cells, extents, sizes = (torch.cat(column) for column in list(zip(*scales, strict=True))[1:])
    grids = [output.shape[-2:] for output, own in zip(outputs, priors, strict=True) for _ in own]
    grids = torch.tensor(grids, device=numbers.device)
    starts = grids.prod(1).cumsum(0) - grids.prod(1)
    parts = numbers[..., :2], numbers[..., 2:4], numbers[..., 4], numbers[..., NUMBERS:]
    return Predictions(*parts, cells, extents, sizes, starts, grids)


def _of_scale(output: Tensor, priors: Sequence[tuple[float, float]], stride: int) -> tuple[Tensor, ...]:
    """Return the numbers (N, P', 5 + C) of one scale's predictions, their cells, priors and strides."""
    n, _, rows, columns = output.shape
    count = len(priors) * rows * columns
    numbers = output.reshape(n, len(priors), -1, rows, columns).permute(0, 1, 3, 4, 2).reshape(n, count, -1)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    cells = torch.stack((x, y), -1).repeat(len(priors), 1, 1, 1).reshape(count, 2)
    extents = torch.tensor(priors, dtype=output.dtype).repeat_interleave(rows * columns, 0)
    return numbers, cells.to(output), extents.to(output), torch.full((count, 1), float(stride)).to(output)
