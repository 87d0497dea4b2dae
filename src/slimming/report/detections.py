"""A page of detections: the same images under several networks, with the boxes that each finds and those that are there."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from slimming.report.drawing import DARK, MIDDLE, pyplot, save_figure

COLUMNS = 4  # images side by side
SIDE = 2.6  # inches of an image
SHOWN = 0.3  # confidence from which a box is drawn


def detections(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    truth: Sequence[Mapping[str, Tensor]],
    found: Mapping[str, Sequence[Mapping[str, Tensor]]],
    names: Sequence[str],
    path: Path,
    shown: float = SHOWN,
) -> None:
    """Draw images with their boxes, true ones dashed; one row for each network, four images side by side.

    Args:
        images: (N, 3 or 1, H, W) as the network gets them: normalised by mean and std (per channel, in [0, 1]).
        truth: of every image `boxes` (n, 4), corners in pixels, and `labels` (n,).
        found: by what is said of a network ("before pruning"), of every image `boxes`, `labels` and `scores` (n,) in [0, 1].
        names: of the classes.
        shown: boxes with a lower score are left out.
    """
    plt = pyplot()
    pictures = _pictures(images, mean, std)
    columns, bands = min(COLUMNS, len(pictures)), -(-len(pictures) // COLUMNS)
    rows, (height, width) = bands * len(found), images.shape[2:]
    size = columns * SIDE + 0.4, rows * SIDE * height / width + 0.9
    figure, panels = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in panels.flat:
        axes.axis("off")
    for number, picture in enumerate(pictures):
        band, column = divmod(number, columns)
        for row, (title, results) in enumerate(found.items()):
            axes = panels[band * len(found) + row, column]
            _panel(axes, picture, truth[number], _confident(results[number], shown), names)
            if column == 0:
                _name_row(axes, title)
    _legend(figure, shown)
    save_figure(figure, path)


def _pictures(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Undo the normalisation: (N, H, W, 3) in [0, 1]."""
    pixels = images.detach().cpu().float().permute(0, 2, 3, 1).numpy() * np.array(std) + np.array(mean)
    return np.broadcast_to(pixels, (*pixels.shape[:3], 3)).clip(0, 1)


def _confident(result: Mapping[str, Tensor], least: float) -> dict[str, list]:
    kept = result["scores"] >= least
    return {key: result[key][kept].tolist() for key in ("boxes", "labels", "scores")}


def _panel(
    axes, picture: np.ndarray, truth: Mapping[str, Tensor], found: dict[str, list], names: Sequence[str]
) -> None:
    height, width = picture.shape[:2]
    axes.imshow(picture, extent=(0, width, height, 0), interpolation="nearest")  # pixel 0 reaches from 0 to 1
    for box in truth["boxes"].tolist():
        _rectangle(axes, box, "white", linewidth=2.6)  # a rim: dashes must be seen on any background
        _rectangle(axes, box, DARK, linewidth=1.4, linestyle=(0, (3, 2)))
    for box, label, score in zip(found["boxes"], found["labels"], found["scores"], strict=True):
        _rectangle(axes, box, MIDDLE, linewidth=1.6)
        place = min(max(box[0], 0), width), min(max(box[1], 0.07 * height), height)
        words = f"{names[label]} {100 * score:.0f}%"
        style = {"facecolor": MIDDLE, "edgecolor": "none", "pad": 0.8}
        axes.text(*place, words, fontsize=6.5, color="black", va="bottom", clip_on=True, bbox=style)
    axes.set(xlim=(0, width), ylim=(height, 0))


def _rectangle(axes, box: Sequence[float], colour: str, **style) -> None:
    x1, y1, x2, y2 = box
    axes.add_patch(pyplot().Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, **style))


def _name_row(axes, title: str) -> None:
    axes.annotate(
        title, (0, 0.5), (-6, 0), "axes fraction", "offset points", rotation=90, ha="right", va="center", fontsize=10
    )


def _legend(figure, shown: float) -> None:
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=MIDDLE, linewidth=1.6),
        Line2D([], [], color=DARK, linewidth=1.4, linestyle=(0, (3, 2))),
    ]
    words = f"found, with a confidence of at least {100 * shown:.0f}%", "true"
    figure.legend(lines, words, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
