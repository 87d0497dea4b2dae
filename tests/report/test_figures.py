"""Figures are drawn from plain records."""

from PIL import Image

from slimming.report import comparisons, figures
from slimming.report.collect import Run


def test_curves_and_gammas(tmp_path):
    rows = [{"epoch": i, "train/loss": 1 / i, "train/acc": 0.5, "test/loss": 2 / i, "test/acc": 0.4} for i in (1, 2, 3)]
    figures.curves(rows, tmp_path / "curves.png")
    edges = [0.0, 1e-3, 1e-2, 1e-1, 1.0]
    figures.gammas([[0, 0, 0, 10], [5, 0, 2, 3]], edges, tmp_path / "gammas.png", 1e-4)
    for name in ("curves", "gammas"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width > 600 and len(image.convert("RGB").getcolors(1 << 20)) > 20
    assert not list(tmp_path.glob(".*"))


def test_epochs_without_evaluation(tmp_path):
    figures.curves([{"epoch": 1, "train/loss": 1.0, "train/acc": 0.5}], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_a_threshold_below_all_bins_is_labelled_where_it_is_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(comparisons, "save_figure", lambda figure, path: drawn.append(figure))
    edges = [0.0, 1e-3, 1e-2, 1e-1, 1.0]
    sparse = Run(tmp_path, {"gammas": {"counts": [[5, 0, 2, 3]], "edges": edges}})
    pruned = {"gammas": {"threshold": 1e-12}, "ratio": {"asked": 0.3}, "score": "gamma"}
    comparisons.thresholds(sparse, [Run(tmp_path, pruned)], tmp_path / "x.png")
    (axis,) = drawn[0].axes
    (label,) = axis.texts
    assert label.get_text() == "ratio 0.3" and label.xy[0] == axis.lines[0].get_xdata()[0] == -4
