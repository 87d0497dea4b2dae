"""What the pictures share: colours that differ in lightness (they survive a grey print), and the axis of |gamma|."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from slimming.files import replacing

DARK, MIDDLE, LIGHT, GREY = "#1b3a6b", "#e08214", "#c9d6ea", "#888888"


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure, path: Path, dpi: int = 120) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")
    pyplot().close(figure)


class LogBins:
    """Bins of |gamma| on a logarithmic axis: the first one starts at 0 and is drawn as wide as the second.

    Args:
        edges: of the bins, (bins + 1,).
        counts: (bins,), at least one of them positive; bins below the first and above the last positive one are not shown.
    """

    def __init__(self, edges: Sequence[float], counts: Sequence[float]):
        logs = np.log10(np.array(edges[1:]))
        used = np.flatnonzero(counts)
        self.shown = slice(used[0], used[-1] + 1)
        self.edges = np.concatenate(([2 * logs[0] - logs[1]], logs))  # (bins + 1,): positions on the axis
        self.shown_edges = self.edges[used[0] : used[-1] + 2]

    def position(self, value: float) -> float:
        """Return where a value lies on the axis; what is below all bins lies at the axis' left end."""
        return max(np.log10(value), self.edges[0]) if value > 0 else self.edges[0]

    def bars(self, axes, counts: Sequence[int], bottom: Sequence[int] | None = None, **style) -> None:
        base = 0 if bottom is None else np.array(bottom)[self.shown]
        left, width = self.shown_edges[:-1], np.diff(self.shown_edges)
        axes.bar(left, np.array(counts)[self.shown], width, base, align="edge", **style)

    def label(self, axis) -> None:
        """Write powers of ten, and 0 where the first bin is shown, on a matplotlib axis (`axes.xaxis`)."""
        ends = self.shown_edges[0], self.shown_edges[-1]
        ticks = [t for t in np.arange(np.ceil(ends[0]), np.floor(ends[1]) + 1) if self.shown.start or t > ends[0] + 0.4]
        names = [f"$10^{{{t:.0f}}}$" for t in ticks]
        zero = [] if self.shown.start else [ends[0]]
        axis.set_ticks([*zero, *ticks], ["0"] * len(zero) + names)
