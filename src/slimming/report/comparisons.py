"""Pictures over several runs. Curves differ in style, marker and lightness, so that they survive a grey print."""

from pathlib import Path

import numpy as np

from slimming.report.drawing import DARK, GREY, LIGHT, MIDDLE, LogBins, pyplot, save_figure
from slimming.report.outcomes import Kind, Point

# Colour and marker of the settings of a sweep: more curves could not be told apart.
SETTINGS = [(DARK, "o"), (MIDDLE, "s"), ("#5fa2ce", "^")]
STYLES = {  # of the kinds of network in `tradeoff`, the last drawn above the others
    Kind.SPARSE: {"marker": "s", "color": GREY, "markersize": 6},
    Kind.BEFORE_CALIBRATION: {"marker": "o", "color": "#5fa2ce", "markersize": 5, "mfc": "white"},
    Kind.CALIBRATED: {"marker": "o", "color": DARK, "markersize": 5},
    Kind.REPAIRED: {"marker": "D", "color": "#7b3294", "markersize": 6},
    Kind.FINETUNED: {"marker": "*", "color": MIDDLE, "markersize": 12},
    Kind.SCRATCH: {"marker": "X", "color": "#b35806", "markersize": 8},
    Kind.BASELINE: {"marker": "P", "color": "black", "markersize": 9},
}
MOST_THRESHOLDS = 6

Points = dict[Kind, list[Point]]


def tradeoff(panels: dict[str, Points], path: Path, called: str = "accuracy") -> None:
    """Draw accuracy against costs: one panel per cost, a mark for every kind of network, a line at the baseline.

    Args:
        panels: points by kind, by the label of the x axis.
        called: what the networks are judged by.
    """
    plt = pyplot()
    size = (5.2 * len(panels), 4.2)
    figure, row = plt.subplots(1, len(panels), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axes, (label, points) in zip(row[0], panels.items(), strict=True):
        for kind, style in STYLES.items():
            if points.get(kind):
                _draw(axes, points[kind], linestyle="none", label=kind.label, **style)
        for point in points.get(Kind.BASELINE, []):
            axes.axhline(point.y, color="black", linestyle=":", linewidth=1)
        axes.set(xlabel=label)
        axes.set_xlim(0, 1.06 * max(point.x for kind in points.values() for point in kind))
        axes.grid(alpha=0.3)
    row[0][0].set_ylabel(f"test {called} (%)")
    figure.legend(*row[0][0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=7)
    save_figure(figure, path)


def sweep(
    curves: dict[str, Points],
    path: Path,
    size: tuple[float, float] = (7.5, 4.6),
    dpi: int = 120,
    called: str = "accuracy",
) -> None:
    """Draw accuracy against the channels removed: a colour per setting, a style per kind.

    Args:
        curves: points before calibration, calibrated and fine-tuned, by setting; at most as many as `SETTINGS`.
        size: in inches.
        called: what the networks are judged by.
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    styles = {
        Kind.BEFORE_CALIBRATION: {"linestyle": ":", "markersize": 5, "mfc": "white"},
        Kind.CALIBRATED: {"linestyle": "-", "markersize": 5},
        Kind.REPAIRED: {"linestyle": "-.", "markersize": 5},
        Kind.FINETUNED: {"linestyle": "none", "markersize": 12, "marker": "*"},
    }
    for points, (colour, marker) in zip(curves.values(), SETTINGS, strict=False):
        for kind, style in styles.items():
            if points.get(kind):
                _draw(axes, sorted(points[kind], key=lambda p: p.x), **{"color": colour, "marker": marker} | style)
    several = len(curves) > 1
    shown = [kind for kind in styles if any(points.get(kind) for points in curves.values())]
    handles = [
        plt.Line2D([], [], color=c, marker=m, label=k) for k, (c, m) in zip(curves, SETTINGS, strict=False)
    ] * several
    colour = GREY if several else DARK
    handles += [plt.Line2D([], [], **{"color": colour, "marker": "o", "label": k.label} | styles[k]) for k in shown]
    axes.set(xlabel="channels removed (%)", ylabel=f"test {called} (%)")
    axes.grid(alpha=0.3)
    figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=2 if several else 3)
    save_figure(figure, path, dpi)


def _draw(axes, points: list[Point], **style) -> None:
    """Draw points, and bars for the spread over seeds where there are several."""
    axes.plot([p.x for p in points], [p.y for p in points], **style)
    several = [p for p in points if p.spread]
    x, y, spread = ([getattr(p, name) for p in several] for name in ("x", "y", "spread"))
    axes.errorbar(x, y, spread, fmt="none", ecolor=style["color"], capsize=3, elinewidth=1)


def kept(rows: list[tuple[str, list, list]], path: Path) -> None:
    """Draw the share of channels that every BatchNorm kept: one row per network, white = none, dark = all.

    Args:
        rows: (title, widths before, widths after); all with equally many layers.
    """
    plt = pyplot()
    numbers = [[(b, a) for b, a in zip(before, after, strict=True) if b != "M"] for _, before, after in rows]
    share = np.array([[a / b for b, a in row] for row in numbers])
    columns = share.shape[1]
    size = (max(7, min(15, 0.42 * columns + 2.6)), 1.0 + 0.26 * len(rows))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    image = axes.imshow(share, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    if columns <= 40:
        for y, row in enumerate(numbers):
            for x, (_, a) in enumerate(row):
                colour = "white" if share[y, x] > 0.5 else "black"
                axes.annotate(str(a), (x, y), ha="center", va="center", fontsize=7, color=colour)
    axes.set_yticks(range(len(rows)), [title for title, *_ in rows], fontsize=8)
    step = max(1, columns // 20)
    axes.set_xticks(range(0, columns, step), range(1, columns + 1, step), fontsize=8)
    axes.set_xlabel("BatchNorm layer, in order" + " (numbers: channels kept)" * (columns <= 40))
    figure.colorbar(image, label="share kept", ticks=[0, 0.5, 1])
    save_figure(figure, path)


def thresholds(counts: list[int], edges: list[float], marks: list[tuple[float, str]], path: Path) -> None:
    """Draw the distribution of |gamma| of a network with the thresholds of its prunings, given by (|gamma|, name)."""
    plt = pyplot()
    bins = LogBins(edges, counts)
    figure, axes = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
    bins.bars(axes, counts, color=LIGHT, edgecolor=DARK)
    readable = {
        "fontsize": 7.5,
        "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.6},
    }  # over the other lines
    for i, (threshold, name) in enumerate(marks[:: max(1, -(-len(marks) // MOST_THRESHOLDS))]):
        position = bins.position(threshold)
        axes.axvline(position, color=MIDDLE, linestyle="--", linewidth=1.2)
        height = 1.0 - 0.085 * (i % 4)
        axes.annotate(name, (position, height), (3, -9), ("data", "axes fraction"), "offset points", **readable)
    bins.label(axes.xaxis)
    axes.set(xlabel="|gamma|", ylabel="channels", ylim=(0, max(counts) * 1.25))
    save_figure(figure, path)
