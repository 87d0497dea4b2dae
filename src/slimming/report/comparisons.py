"""Figures over several runs. Lines differ in style, marker and lightness, so that they survive a grey print."""

from pathlib import Path

import numpy as np

from slimming.report.collect import Run
from slimming.report.figures import DARK, LIGHT, MIDDLE, pyplot, save_figure

LINES = [(DARK, "o"), (MIDDLE, "s"), ("#7fb3d5", "^"), ("#4d4d4d", "D"), ("#b35806", "v"), ("#8073ac", "P")]
MOST_THRESHOLDS = 6


def sweep(curves: dict[str, list[Run]], tuned: dict[int, float], path: Path) -> None:
    """Draw accuracy against the ratio and against the MACs that remain: at once, calibrated, fine-tuned.

    Args:
        curves: prunings by what they have in common.
        tuned: accuracy after fine-tuning by id of the pruning, where there is one.
    """
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2 + 0.2 * len(curves)), layout="constrained", sharey=True)
    axes = [
        (left, lambda r: 100 * r["ratio"]["got"], "channels removed (%)"),
        (right, lambda r: 100 * r["cost"]["macs"] / r["cost_before"]["macs"], "MACs that remain (%)"),
    ]
    for axis, place, label in axes:
        for (name, runs), (colour, marker) in zip(curves.items(), LINES, strict=False):
            runs = sorted(runs, key=lambda run: place(run.result))
            x = [place(run.result) for run in runs]
            once, done = ([100 * run.result["metrics"][k] for run in runs] for k in ("test/acc_pruned", "test/acc"))
            axis.plot(x, once, ":", color=colour, marker=marker, markersize=4, mfc="white", label=f"{name}: at once")
            axis.plot(x, done, "-", color=colour, marker=marker, markersize=5, label=f"{name}: calibrated")
            points = [(a, 100 * tuned[id(run)]) for a, run in zip(x, runs, strict=True) if id(run) in tuned]
            if points:
                axis.plot(*zip(*points, strict=True), "*", color=colour, markersize=12, label=f"{name}: fine-tuned")
        axis.set(xlabel=label)
        axis.grid(alpha=0.3)
    right.invert_xaxis()
    left.set_ylabel("test accuracy (%)")
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, fontsize=7.5, loc="outside lower center", ncols=3)
    save_figure(figure, path)


def kept(rows: list[tuple[str, list, list]], path: Path) -> None:
    """Draw the share of channels that every BatchNorm kept: one row per network, white = none, dark = all.

    Args:
        rows: (title, widths before, widths after); all with equally many layers.
    """
    plt = pyplot()
    numbers = [[(b, a) for b, a in zip(before, after, strict=True) if b != "M"] for _, before, after in rows]
    share = np.array([[a / b for b, a in row] for row in numbers])
    columns = share.shape[1]
    size = (max(7, min(15, 0.42 * columns + 2.6)), 0.9 + 0.34 * len(rows))
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    image = axis.imshow(share, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    if columns <= 40:
        for y, row in enumerate(numbers):
            for x, (_, a) in enumerate(row):
                colour = "white" if share[y, x] > 0.5 else "black"
                axis.annotate(str(a), (x, y), ha="center", va="center", fontsize=7, color=colour)
    axis.set_yticks(range(len(rows)), [title for title, *_ in rows], fontsize=8)
    step = max(1, columns // 20)
    axis.set_xticks(range(0, columns, step), range(1, columns + 1, step), fontsize=8)
    axis.set_xlabel("BatchNorm layer, in order" + " (numbers: channels kept)" * (columns <= 40))
    figure.colorbar(image, label="share kept", ticks=[0, 0.5, 1])
    save_figure(figure, path)


def thresholds(sparse: Run, prunings: list[Run], path: Path) -> None:
    """Draw the distribution of |gamma| of a sparse network with the thresholds of its prunings."""
    plt = pyplot()
    record = sparse.result["gammas"]
    counts = np.array(record["counts"][-1])
    log_edges = np.log10(np.array(record["edges"][1:]))
    y = np.concatenate(([2 * log_edges[0] - log_edges[1]], log_edges))
    used = np.flatnonzero(counts)
    low, high = used[0], used[-1]
    figure, axis = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
    axis.bar(
        y[low : high + 1], counts[low : high + 1], np.diff(y)[low : high + 1], align="edge", color=LIGHT, edgecolor=DARK
    )
    found = {(r["gammas"]["threshold"], r["ratio"]["asked"]) for r in (p.result for p in prunings) if _common(r)}
    marks = sorted(found, key=lambda mark: (mark[0], mark[1] or 0))
    chosen = marks[:: max(1, -(-len(marks) // MOST_THRESHOLDS))]
    for i, (threshold, asked) in enumerate(chosen):
        place = max(np.log10(threshold), y[0])  # the first bar stands for everything from 0
        axis.axvline(place, color=MIDDLE, linestyle="--", linewidth=1.2)
        text = f"ratio {asked:g}" if asked is not None else f"{threshold:.2g}"
        height = 1.0 - 0.085 * (i % 4)
        axis.annotate(text, (place, height), (2, -9), ("data", "axes fraction"), "offset points", fontsize=7.5)
    ticks = np.arange(np.ceil(y[low]), np.floor(y[high + 1]) + 1)
    axis.set_xticks(ticks, [f"$10^{{{t:.0f}}}$" for t in ticks])
    axis.set(xlabel="|gamma|" + " (leftmost bar: from 0)" * bool(low == 0), ylabel="channels")
    axis.set_ylim(0, counts.max() * 1.25)
    save_figure(figure, path)


def _common(result: dict) -> bool:
    return bool(result["gammas"].get("threshold")) and result["score"] == "gamma"


def timeline(stages: list[tuple[str, Run]], path: Path) -> None:
    """Draw loss and accuracy of successive trainings on one axis of epochs; `stages`: (title, run with a history)."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    start = 0
    for number, (title, run) in enumerate(stages):
        history = run.result["history"]
        epochs = start + np.array([row["epoch"] for row in history])
        held = "val" if "val/acc" in history[-1] else "test"
        for axis, key, scale in ((left, "loss", 1), (right, "acc", 100)):
            for split, colour, style in (("train", MIDDLE, "--"), (held, DARK, "-")):
                values = [row.get(f"{split}/{key}", np.nan) * scale for row in history]
                label = split if number == 0 else None
                axis.plot(epochs, values, style, color=colour, marker="o", markersize=2.5, label=label)
            if number:
                axis.axvline(start + 0.5, color="#888888", linewidth=0.8)
            axis.annotate(title, (start + 0.7, 0.99), xycoords=("data", "axes fraction"), va="top", fontsize=7.5)
        start += history[-1]["epoch"]
    left.set(xlabel="epoch", ylabel="cross-entropy")
    right.set(xlabel="epoch", ylabel="accuracy (%)")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.margins(y=0.12)
        axis.xaxis.get_major_locator().set_params(integer=True)
    right.legend(loc="lower right", fontsize=8)
    save_figure(figure, path)
