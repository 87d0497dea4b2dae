"""Pictures of one run, drawn from its record alone."""

from pathlib import Path

import numpy as np

from slimming.records import SCORES, Score
from slimming.report.drawing import DARK, GREY, LIGHT, MIDDLE, LogBins, pyplot, save_figure


def curves(history: list[dict], path: Path, score: Score = SCORES["classification"]) -> None:
    """Draw loss and score over the epochs, training against held-out data."""
    splits = [split for split in (_held_out(history), "train") if f"{split}/{score.key}" in history[-1]]
    shown = [f"{split} {history[-1][f'{split}/{score.key}']:.2%}" for split in splits[:1]]
    timeline([("", history)], path, ": ".join([f"after {len(history)} epochs", *shown]), score)


def timeline(
    trainings: list[tuple[str, list[dict]]], path: Path, title: str = "", score: Score = SCORES["classification"]
) -> None:
    """Draw loss and score of successive trainings, given by (name, history), on one axis of epochs."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axes, key, scale, label in zip(
        panels, ("loss", score.key), (1, 100), (score.loss, f"{score.called} (%)"), strict=True
    ):
        start = 0
        for number, (name, history) in enumerate(trainings):
            epochs = [start + row["epoch"] for row in history]
            for split, colour, style in (("train", MIDDLE, "--"), (_held_out(history), DARK, "-")):
                values = [row.get(f"{split}/{key}", np.nan) * scale for row in history]
                label_once = None if number else split
                axes.plot(epochs, values, style, color=colour, marker="o", markersize=2.5, label=label_once)
            if number:
                axes.axvline(start + 0.5, color=GREY, linewidth=0.8)
            axes.annotate(name, (start + 0.7, 1), (0, 3), ("data", "axes fraction"), "offset points", fontsize=8)
            start += history[-1]["epoch"]
        axes.set(
            xlabel="epoch", ylabel=label, xlim=(0.5 - 0.02 * start, 0.5 + 1.02 * start)
        )  # fixed: all values may be NaN
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[1].legend(loc="lower right", fontsize=8)
    if title:
        figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def _held_out(history: list[dict]) -> str:
    return "val" if any(key.startswith("val/") for key in history[-1]) else "test"


def gammas(counts: list[list[int]], edges: list[float], path: Path, penalty: str) -> None:
    """Draw how the distribution of |gamma| moved: one column per epoch, shade = share of the gammas in a bin.

    Args:
        counts: [epoch][bin], epoch 0 being the start.
        edges: of the bins, the first bin starting at 0.
        penalty: what the title says of it: `lambda 0.0001`.
    """
    plt = pyplot()
    from matplotlib.colors import PowerNorm

    share = np.array(counts, dtype=float).T  # (bins, epochs + 1)
    share = 100 * share / share.sum(0).clip(1)
    bins = LogBins(edges, share.sum(1))
    columns = np.arange(share.shape[1])
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    colours = PowerNorm(0.4, 0, 100)  # a bin with 1% must be seen beside one with 100%
    between = np.arange(len(columns) + 1) - 0.5
    mesh = axes.pcolormesh(between, bins.shown_edges, share[bins.shown], cmap="Greys", norm=colours)
    ends: dict[float, list[str]] = {}  # lines that end together have one label
    for q, line in _quantiles(share / 100, bins.edges).items():
        axes.plot(columns, line, color=MIDDLE, linewidth=1.5 if q == 50 else 0.8)
        ends.setdefault(float(line[-1]), []).append(f"{q}%")
    for end, names in ends.items():
        label = ", ".join(names)
        axes.annotate(label, (columns[-1], end), (4, 0), textcoords="offset points", va="center", fontsize=8)
    bins.label(axes.yaxis)
    axes.set(xlabel="epoch (0: before training)", ylabel="|gamma|", xlim=(-0.5, 1.07 * len(columns) - 0.5))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(f"{sum(counts[-1]):,} BatchNorm scales, {penalty}; lines: quantiles", fontsize=11)
    figure.colorbar(mesh, label="share of gammas (%)", ticks=[0, 1, 5, 20, 50, 100])
    save_figure(figure, path)


def _quantiles(share: np.ndarray, edges: np.ndarray) -> dict[int, np.ndarray]:
    """Read quantiles (per cent) off a histogram (bins, epochs), at the middle of their bin."""
    cumulative = share.cumsum(0)
    middle = (edges[:-1] + edges[1:]) / 2
    return {q: middle[(cumulative < q / 100 - 1e-9).sum(0).clip(max=len(middle) - 1)] for q in (10, 50, 90)}


def widths(before: list, after: list, path: Path) -> None:
    """Draw how many channels every BatchNorm kept and lost; "M" among them is a max pooling."""
    plt = pyplot()
    pairs = [(b, a) for b, a in zip(before, after, strict=True) if b != "M"]
    old, new = (np.array(column) for column in zip(*pairs, strict=True))
    number = np.arange(1, len(old) + 1)
    figure, axes = plt.subplots(figsize=(max(6.5, min(14, 0.32 * len(old))), 3.8), layout="constrained")
    axes.bar(number, new, color=DARK, label=f"kept: {new.sum():,}")
    axes.bar(number, old - new, bottom=new, color=LIGHT, label=f"removed: {(old - new).sum():,}")
    if len(old) <= 40:
        for x, a, b in zip(number, new, old, strict=True):
            axes.annotate(f"{a}", (x, b), (0, 2), textcoords="offset points", ha="center", fontsize=7)
    axes.set(xlabel="BatchNorm layer, in order", ylabel="channels", xlim=(0.3, len(old) + 0.7))
    axes.margins(y=0.12)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8)
    axes.set_title(f"{new.sum() / old.sum():.1%} of {old.sum():,} channels kept (numbers: kept)", fontsize=11)
    save_figure(figure, path)


def split_gammas(kept: list[int], removed: list[int], edges: list[float], threshold: float | None, path: Path) -> None:
    """Draw the distribution of |gamma| before pruning, kept and removed ones stacked, and the threshold between them.

    Args:
        kept, removed: counts per bin.
        edges: of the bins, the first bin starting at 0.
        threshold: None where there is no common one.
    """
    plt = pyplot()
    counts = np.array([kept, removed])
    bins = LogBins(edges, counts.sum(0))
    figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
    bins.bars(axes, kept, color=DARK, label=f"kept: {sum(kept):,}")
    bins.bars(axes, removed, bottom=kept, color=LIGHT, label=f"removed: {sum(removed):,}")
    if threshold:
        axes.axvline(bins.position(threshold), color=MIDDLE, linestyle="--", label=f"threshold {threshold:.3g}")
    bins.label(axes.xaxis)
    axes.set(xlabel="|gamma| before pruning", ylabel="channels")
    axes.legend(fontsize=8)
    axes.set_title(f"{counts.sum():,} BatchNorm scales", fontsize=11)
    save_figure(figure, path)
