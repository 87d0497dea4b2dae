"""The page of detections: one row of panels per network, boxes where they are, whatever is missing."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from slimming.report import detections as page
from slimming.report.drawing import MIDDLE

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def boxes(*rows, scores=None):
    """Return the target of boxes (x1, y1, x2, y2), all of class 1."""
    found = {"boxes": torch.tensor(rows, dtype=torch.float32).view(-1, 4), "labels": torch.ones(len(rows)).long()}
    return found if scores is None else found | {"scores": torch.tensor(scores)}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, still open."""
    kept = []
    monkeypatch.setattr(page, "save_figure", lambda figure, path: kept.append(figure))
    yield kept
    plt.close("all")


def rectangles(axes, colour):
    wanted = plt.matplotlib.colors.to_rgba(colour)
    return [patch.get_bbox().extents.tolist() for patch in axes.patches if patch.get_edgecolor() == wanted]


def test_every_network_has_a_row_and_every_box_its_place(drawn, tmp_path):
    n = 6  # two bands of at most four images
    images = torch.randn(n, 3, 20, 30)
    truth = [boxes((1, 2, 11, 12))] * n
    before = [boxes((2, 3, 10, 11), (5, 5, 9, 9), scores=[0.9, 0.1])] * n
    after = [boxes(scores=[])] * n
    page.detections(images, MEAN, STD, truth, {"before": before, "after": after}, ["cat", "dog"], tmp_path / "a.png")
    panels = np.array(drawn[0].axes).reshape(4, 4)
    assert [len(axes.images) for axes in panels.flat] == [1] * 8 + [1, 1, 0, 0] * 2
    for axes in panels.flat:
        assert rectangles(axes, "white") == [[1, 2, 11, 12]] * len(axes.images)
    first, second = panels[0, 0], panels[1, 0]
    assert rectangles(first, MIDDLE) == [[2, 3, 10, 11]] and rectangles(second, MIDDLE) == []
    assert [t.get_text() for t in first.texts] == ["dog 90%", "before"] and [t.get_text() for t in second.texts] == [
        "after"
    ]


def test_pixels_are_shown_as_they_were(drawn, tmp_path):
    pixels = torch.rand(1, 3, 8, 8)
    normal = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    page.detections(normal, MEAN, STD, [boxes()], {"x": [boxes(scores=[])]}, ["a"], tmp_path / "a.png")
    shown = drawn[0].axes[0].images[0].get_array()
    np.testing.assert_allclose(shown, pixels[0].permute(1, 2, 0), atol=1e-6)
    assert tuple(drawn[0].axes[0].images[0].get_extent()) == (0, 8, 8, 0)


def test_a_png_is_written_whole(tmp_path):
    one = [boxes((1, 1, 5, 5), scores=[0.5])]
    page.detections(
        torch.zeros(1, 3, 16, 16), MEAN, STD, [boxes()], {"a": one, "b": one}, ["x", "y"], tmp_path / "p.png"
    )
    with Image.open(tmp_path / "p.png") as image:
        assert image.format == "PNG" and min(image.size) > 200
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]
