"""Figures of one run, drawn from its record alone. Colours differ in lightness, so that they survive a grey print."""

from pathlib import Path

import numpy as np

from slimming.files import replacing

DARK, MIDDLE, LIGHT = "#1b3a6b", "#e08214", "#c9d6ea"


def curves(history: list[dict], path: Path) -> None:
    """Draw loss and accuracy over the epochs, training against held-out data."""
    plt = pyplot()
    epochs = [row["epoch"] for row in history]
    held = "val" if "val/acc" in history[-1] else "test"
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axis, key, scale, title in ((left, "loss", 1, "cross-entropy"), (right, "acc", 100, "accuracy (%)")):
        for split, colour, style in (("train", MIDDLE, "--"), (held, DARK, "-")):
            values = [row.get(f"{split}/{key}", np.nan) * scale for row in history]
            axis.plot(epochs, values, style, color=colour, marker="o", markersize=3, label=split)
        axis.set(xlabel="epoch", ylabel=title)
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    right.legend(loc="lower right")
    last = history[-1]
    note = f"{held} {last[f'{held}/acc']:.2%}" if f"{held}/acc" in last else f"train {last['train/acc']:.2%}"
    figure.suptitle(f"after {len(history)} epochs: {note}", fontsize=11)
    save_figure(figure, path)


def gammas(counts: list[list[int]], edges: list[float], path: Path, sparsity: float) -> None:
    """Draw how the distribution of |gamma| moved: one column per epoch, shade = share of the gammas in a bin.

    Args:
        counts: [epoch][bin], epoch 0 being the start.
        edges: of the bins, the first bin starting at 0.
    """
    plt = pyplot()
    share = np.array(counts, dtype=float).T  # (bins, epochs + 1)
    share = 100 * share / share.sum(0).clip(1)
    edges = np.array(edges)
    used = np.flatnonzero(share.sum(1))
    low, high = used[0], min(used[-1] + 1, len(edges) - 2)
    log_edges = np.log10(edges[1:])
    y = np.concatenate(([log_edges[0] - (log_edges[1] - log_edges[0])], log_edges))  # a place for the bin from 0
    figure, axis = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    from matplotlib.colors import PowerNorm

    colours = PowerNorm(0.4, 0, 100)  # a bin with 1% must be seen beside one with 100%
    mesh = axis.pcolormesh(
        np.arange(share.shape[1] + 1) - 0.5, y[low : high + 2], share[low : high + 1], cmap="Greys", norm=colours
    )
    share_curve = _quantiles(share / 100, y)
    for q, line in share_curve.items():
        axis.plot(np.arange(share.shape[1]), line, color=MIDDLE, linewidth=1.5 if q == 50 else 0.8)
        axis.annotate(
            f"{q}%", (share.shape[1] - 1, line[-1]), (4, 0), textcoords="offset points", va="center", fontsize=8
        )
    ticks = np.arange(np.ceil(y[low]), np.floor(y[high + 1]) + 1)
    axis.set_yticks(ticks, [f"$10^{{{t:.0f}}}$" for t in ticks])
    axis.set(xlabel="epoch (0: before training)", ylabel="|gamma|", xlim=(-0.5, share.shape[1] - 0.2))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_title(f"{int(sum(counts[-1])):,} BatchNorm scales, lambda {sparsity:g}; lines: quantiles", fontsize=11)
    figure.colorbar(mesh, label="share of gammas (%)", ticks=[0, 1, 5, 20, 50, 100])
    save_figure(figure, path)


def widths(before: list, after: list, path: Path) -> None:
    """Draw how many channels every BatchNorm kept and lost; entries as the public codes' `cfg` ("M": a pooling)."""
    plt = pyplot()
    pairs = [(b, a) for b, a in zip(before, after, strict=True) if b != "M"]
    old, new = (np.array(column) for column in zip(*pairs, strict=True))
    place = np.arange(1, len(old) + 1)
    figure, axis = plt.subplots(figsize=(max(6.5, min(14, 0.32 * len(old))), 3.8), layout="constrained")
    axis.bar(place, new, color=DARK, label=f"kept: {new.sum():,}")
    axis.bar(place, old - new, bottom=new, color=LIGHT, label=f"removed: {(old - new).sum():,}")
    if len(old) <= 40:
        for x, a, b in zip(place, new, old, strict=True):
            axis.annotate(f"{a}", (x, b), (0, 2), textcoords="offset points", ha="center", fontsize=7)
    axis.set(xlabel="BatchNorm layer, in order", ylabel="channels", xlim=(0.3, len(old) + 0.7))
    axis.margins(y=0.12)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize=8)
    axis.set_title(f"{new.sum() / old.sum():.1%} of {old.sum():,} channels kept (numbers: kept)", fontsize=11)
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
    used = np.flatnonzero(counts.sum(0))
    low, high = used[0], used[-1]
    log_edges = np.log10(np.array(edges[1:]))
    y = np.concatenate(([2 * log_edges[0] - log_edges[1]], log_edges))  # a place for the bin from 0
    left, width = y[low : high + 1], np.diff(y)[low : high + 1]
    figure, axis = plt.subplots(figsize=(7, 3.8), layout="constrained")
    kept_part, removed_part = counts[:, low : high + 1]
    axis.bar(left, kept_part, width, align="edge", color=DARK, label=f"kept: {sum(kept):,}")
    axis.bar(left, removed_part, width, kept_part, align="edge", color=LIGHT, label=f"removed: {sum(removed):,}")
    if threshold:
        axis.axvline(max(np.log10(threshold), y[0]), color=MIDDLE, linestyle="--", label=f"threshold {threshold:.3g}")
    ticks = np.arange(np.ceil(y[low]), np.floor(y[high + 1]) + 1)
    axis.set_xticks(ticks, [f"$10^{{{t:.0f}}}$" for t in ticks])
    axis.set(xlabel="|gamma| before pruning" + " (leftmost bar: from 0)" * bool(low == 0), ylabel="channels")
    axis.legend(fontsize=8)
    axis.set_title(f"{counts.sum():,} BatchNorm scales", fontsize=11)
    save_figure(figure, path)


def _quantiles(share: np.ndarray, y: np.ndarray) -> dict[int, np.ndarray]:
    """Read quantiles (per cent) off a histogram (bins, epochs), at the middle of their bin."""
    cumulative = share.cumsum(0)
    middle = (y[:-1] + y[1:]) / 2
    return {q: middle[(cumulative < q / 100 - 1e-9).sum(0).clip(max=len(middle) - 1)] for q in (10, 50, 90)}


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot().close(figure)
