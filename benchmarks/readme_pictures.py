"""Draws the pictures of the README from the recorded results: python benchmarks/readme_pictures.py

docs/gammas.png: |gamma| of the sparse VGG-19 at a quarter width (results/cifar10, lambda 5e-4); a ratio of 0.5 removes half.
docs/sweep.png: accuracy of the same network against the ratio, before calibration and calibrated.
"""

import json
from pathlib import Path

from slimming.report import comparisons
from slimming.report.collect import collect
from slimming.report.drawing import DARK, MIDDLE, LogBins, pyplot, save_figure
from slimming.report.outcomes import outcomes
from slimming.report.sections import sweep_curves

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "cifar10" / "vgg19_quarter"
SWEEP = RESULTS / "sweep" / "lambda5e-4"
SIZE = (7.0, 3.0)  # inches: 700 x 300 pixels


def gammas(path: Path) -> None:
    sparse = json.loads((RESULTS / "sparse_5e-4" / "result.json").read_text())["gammas"]
    pruned = json.loads((SWEEP / "4_ratio-0.5_gamma" / "result.json").read_text())["gammas"]
    bins = LogBins(sparse["edges"], sparse["counts"][-1])
    plt = pyplot()
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    bins.bars(axes, pruned["removed"], color=MIDDLE, edgecolor="white", linewidth=0.4)
    bins.bars(axes, pruned["kept"], bottom=pruned["removed"], color=DARK, edgecolor="white", linewidth=0.4)
    threshold = bins.position(pruned["threshold"])
    axes.axvline(threshold, color="black", linestyle="--", linewidth=1.2)
    bins.label(axes.xaxis)
    top = 1.15 * max(sparse["counts"][-1])
    axes.set(xlabel="|gamma|: the scale of a channel after sparse training", ylabel="number of channels", ylim=(0, top))
    words = {"ha": "center", "fontsize": 10}
    axes.annotate("threshold", (threshold, top), (-4, -12), textcoords="offset points", ha="right", fontsize=9)
    axes.annotate(
        f"{sum(pruned['removed']):,} channels removed:\ntheir scale is almost 0",
        (-3.6, 0.45 * top),
        color="#a65a00",
        **words,
    )
    axes.annotate(f"{sum(pruned['kept']):,} channels kept", (-0.8, 0.45 * top), color=DARK, **words)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    save_figure(figure, path, dpi=100)


def sweep(path: Path) -> None:
    runs = [run for run in collect(RESULTS).runs if run.folder.parent == SWEEP]
    comparisons.sweep(sweep_curves(outcomes(runs)), path, SIZE, dpi=100)


if __name__ == "__main__":
    gammas(ROOT / "docs" / "gammas.png")
    sweep(ROOT / "docs" / "sweep.png")
