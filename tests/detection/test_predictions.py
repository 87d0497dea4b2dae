"""What raw outputs stand for, and which boxes are reported."""

import math

import pytest
import torch

from slimming.detection.choosing import choose
from slimming.detection.predictions import predictions

PRIORS = (((32.0, 64.0), (48.0, 16.0)), ((8.0, 8.0), (16.0, 8.0)))
STRIDES = (32, 16)


def raw(rows: int = 2, columns: int = 3, classes: int = 2, n: int = 1) -> list[torch.Tensor]:
    """Return outputs that all are 0: every box is its prior, in the middle of its cell."""
    return [torch.zeros(n, 2 * (5 + classes), rows * s, columns * s) for s in (1, 2)]


def test_every_number_is_where_darknet_puts_it():
    outputs = raw()
    values = torch.tensor([0.3, -0.2, 0.5, -1.0, 1.5, -0.7, 2.0])  # t_x, t_y, t_w, t_h, t_o, two classes
    outputs[1][0, 7:14, 3, 5] = values  # the second prior of the fine scale, row 3, column 5
    found = predictions(outputs, PRIORS, STRIDES)
    number = 2 * 2 * 3 + 4 * 6 + 3 * 6 + 5  # two priors of the coarse scale, one of the fine, three rows, five cells
    s = values.sigmoid()
    x, y, w, h = (5 + s[0]) * 16, (3 + s[1]) * 16, 16 * math.exp(0.5), 8 * math.exp(-1)
    torch.testing.assert_close(
        found.boxes()[0, number], torch.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2)), rtol=1e-6, atol=1e-5
    )
    torch.testing.assert_close(found.scores()[0, number], s[4] * s[5:])
    others = torch.arange(found.boxes().shape[1]) != number
    assert (found.scores()[0, others] == 0.25).all()
    assert found.size == (64, 96)


def test_outputs_of_zero_are_the_priors_in_the_middle_of_their_cells():
    boxes = predictions(raw(), PRIORS, STRIDES).boxes()[0]
    assert len(boxes) == 2 * (2 * 3 + 4 * 6)
    assert boxes[0].tolist() == [0, -16, 32, 48] and boxes[1].tolist() == [32, -16, 64, 48]  # the next column
    assert boxes[3].tolist() == [0, 16, 32, 80]  # the next row
    assert boxes[6].tolist() == [-8, 8, 40, 24]  # the next prior
    assert boxes[12].tolist() == [4, 4, 12, 12]  # the next scale


def test_half_precision_is_read_in_float32_and_large_exponents_stay_finite():
    outputs = [o.bfloat16() for o in raw()]
    outputs[0][:, 2] = 1e30
    found = predictions(outputs, PRIORS, STRIDES)
    assert found.boxes().dtype == torch.float32 and found.boxes().isfinite().all()


def test_the_weaker_of_two_boxes_of_one_class_goes():
    boxes = torch.tensor([[[0, 0, 10, 10], [1, 0, 11, 10], [30, 30, 40, 40.0]]])
    scores = torch.tensor([[[0.6, 0.0], [0.9, 0.8], [0.005, 0.3]]])
    (found,) = choose(boxes, scores, (64, 64))
    assert found["scores"].tolist() == pytest.approx([0.9, 0.8, 0.3])
    assert found["labels"].tolist() == [0, 1, 1]  # the second box is reported for both of its classes
    assert found["boxes"].tolist() == [[1, 0, 11, 10], [1, 0, 11, 10], [30, 30, 40, 40]]


def test_boxes_are_cut_at_the_image_and_those_outside_go():
    boxes = torch.tensor([[[-5, -5, 20, 20], [70, 0, 80, 10], [50, 50, 200, 200.0]]])
    (found,) = choose(boxes, torch.tensor([[[0.5], [0.9], [0.4]]]), (60, 64))
    assert found["boxes"].tolist() == [[0, 0, 20, 20], [50, 50, 64, 60]]


def test_nothing_found_is_an_empty_image_and_no_more_than_100_are_reported():
    low, many = choose(
        torch.arange(400.0).view(1, 200, 1, 2).repeat(2, 1, 1, 2).flatten(2) + torch.tensor([0, 0, 1, 1.0]),
        torch.stack((torch.zeros(200, 1), torch.linspace(0.1, 0.9, 200)[:, None])),
        (1000, 1000),
    )
    assert {k: tuple(v.shape) for k, v in low.items()} == {"boxes": (0, 4), "scores": (0,), "labels": (0,)}
    assert len(many["scores"]) == 100 and many["scores"].tolist() == sorted(many["scores"].tolist(), reverse=True)
