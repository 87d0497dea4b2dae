"""Figures are drawn from plain records."""

from PIL import Image

from slimming.report import comparisons, figures
from slimming.report.drawing import LogBins, pyplot


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
    comparisons.thresholds([5, 0, 2, 3], [0.0, 1e-3, 1e-2, 1e-1, 1.0], [(1e-12, "ratio 0.3")], tmp_path / "x.png")
    (axes,) = drawn[0].axes
    (label,) = axes.texts
    assert label.get_text() == "ratio 0.3" and label.xy[0] == axes.lines[0].get_xdata()[0] == -4


def test_bins_of_gamma():
    bins = LogBins([0.0, 1e-3, 1e-2, 1e-1, 1.0], [0, 4, 0, 2])
    assert bins.edges.tolist() == [-4, -3, -2, -1, 0] and bins.shown_edges.tolist() == [-3, -2, -1, 0]
    assert [bins.position(value) for value in (0.0, 1e-9, 1e-2)] == [-4, -4, -2]
    axes = pyplot().figure().add_subplot()
    bins.label(axes.xaxis)
    assert axes.get_xticks().tolist() == [-3, -2, -1, 0]
    LogBins([0.0, 1e-3, 1e-2, 1e-1, 1.0], [1, 4, 0, 0]).label(axes.xaxis)
    assert axes.get_xticklabels()[0].get_text() == "0" and axes.get_xticks().tolist() == [-4, -3, -2]
