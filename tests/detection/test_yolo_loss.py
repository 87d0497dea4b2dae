"""The loss of YOLOv3: its values by hand, its gradients against finite differences, and its corner cases."""

import math

import pytest
import torch
from torch.nn import functional as F

from slimming.detection.predictions import predictions
from slimming.detection.yolo_loss import match, shape_iou, yolo_loss

PRIORS = (((40.0, 40.0),), ((8.0, 8.0),))
STRIDES = (32, 16)


def raw(n: int = 1, classes: int = 2, rows: int = 2, seed: int | None = None) -> list[torch.Tensor]:
    shapes = [(n, 5 + classes, rows * s, rows * s) for s in (1, 2)]
    generator = torch.Generator().manual_seed(seed or 0)
    draws = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return draws if seed is not None else [0 * d for d in draws]


def objects(*boxes: list[float], labels: list[int] | None = None) -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels or [0] * len(boxes), dtype=torch.long),
    }


def test_the_responsible_prediction_has_the_likeliest_shape_and_the_cell_of_the_centre():
    found = predictions(raw(2), PRIORS, STRIDES)
    matches = match(found, [objects([0, 0, 30, 50], [20, 36, 28, 44], labels=[1, 0]), objects([50, 50, 64, 64])])
    assert matches.image.tolist() == [0, 0, 1] and matches.labels.tolist() == [1, 0, 0]
    # centre (15, 25) in the coarse cell (0, 0); (24, 40) in the fine cell of row 2, column 1; (57, 57) in row 3, column 3
    assert matches.index.tolist() == [0, 4 + 2 * 4 + 1, 4 + 3 * 4 + 3]


def test_a_centre_on_the_border_belongs_to_the_last_cell():
    matches = match(predictions(raw(), PRIORS, STRIDES), [objects([60, 60, 68, 68])])
    assert matches.index.tolist() == [4 + 15]


def test_overlap_of_shapes():
    found = shape_iou(torch.tensor([[2.0, 4.0]]), torch.tensor([[2.0, 4.0], [4.0, 2.0], [1.0, 1.0]]))
    assert found[0].tolist() == pytest.approx([1, 4 / 12, 1 / 8])


def test_values_by_hand():
    """One object of 16x16 in a 64x64 image, whose prior is 8x8; all outputs 0."""
    loss = yolo_loss(raw(), [objects([20, 36, 36, 52], labels=[1])], PRIORS, STRIDES)
    weight = 2 - 16 * 16 / (64 * 64)
    # centre (28, 44) is (0.75, 0.75) within its fine cell; the extent is twice the prior's
    centre = 2 * -(0.75 * math.log(0.5) + 0.25 * math.log(0.5))
    assert float(loss["box"]) == pytest.approx(weight * (centre + 2 * math.log(2) ** 2 / 2))
    assert float(loss["classes"]) == pytest.approx(2 * math.log(2))
    assert float(loss["objectness"]) == pytest.approx(20 * math.log(2))  # no box overlaps it by more than a half


def test_the_gradient_of_the_centre_is_the_papers():
    outputs = [o.requires_grad_() for o in raw(seed=3)]
    target = objects([20, 36, 36, 52])
    yolo_loss(outputs, [target], PRIORS, STRIDES)["box"].backward()
    t = outputs[1].detach()[0, :, 2, 1]
    weight = 2 - 16 * 16 / (64 * 64)
    wanted = torch.tensor([0.75, 0.75, math.log(2), math.log(2)], dtype=torch.float64)
    expected = weight * (torch.cat((t[:2].sigmoid(), t[2:4])) - wanted)
    torch.testing.assert_close(outputs[1].grad[0, :4, 2, 1], expected)
    torch.testing.assert_close(outputs[1].grad.abs().sum(), expected.abs().sum())  # and nowhere else
    assert outputs[0].grad.abs().sum() == 0


def test_what_overlaps_an_object_is_not_taught_that_there_is_none():
    outputs = [o.requires_grad_() for o in raw(rows=1)]
    target = objects([6, 6, 14, 14])  # the fine prior in row 0, column 0 lies on 4 ... 12: IoU 36 / 92
    yolo_loss(outputs, [target], PRIORS, STRIDES)["objectness"].backward()
    assert (outputs[1].grad[0, 4] != 0).all()
    outputs = [o.requires_grad_() for o in raw(rows=1)]
    target = objects([4, 4, 28, 28], [2, 2, 30, 30])  # of 24 and 28; the coarse prior, 40 wide, is responsible for both
    with torch.no_grad():
        outputs[1][0, 2:4, 0, 0] = math.log(26 / 8)  # a fine box of 26 around (8, 8): IoU with the first 0.45
        outputs[1][0, :2, 0, 0] = 8.0  # around (16, 16): IoU with the second 26^2 / 28^2
    yolo_loss(outputs, [target], PRIORS, STRIDES)["objectness"].backward()
    assert outputs[1].grad[0, 4, 0, 0] == 0 and (outputs[1].grad[0, 4].flatten()[1:] != 0).all()
    assert outputs[0].grad[0, 4, 0, 0] == -0.5  # itself responsible: taught, whatever it overlaps


TARGETS = {
    "objects in both": [objects([3, 5, 33, 50], [20, 36, 28, 44], labels=[1, 0]), objects([40, 41, 50, 60])],
    "two that share a prediction": [objects([20, 36, 28, 44], [21, 37, 29, 43], labels=[0, 1]), objects()],
    "no objects in a batch": [objects(), objects()],
}


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_gradients_are_those_of_finite_differences(targets):
    shapes = [o.shape for o in raw(2)]

    def total(*outputs):
        return sum(yolo_loss(outputs, targets, PRIORS, STRIDES).values())

    outputs = tuple(o.requires_grad_() for o in raw(2, seed=1))
    assert torch.autograd.gradcheck(total, outputs, eps=1e-6, atol=1e-7, rtol=1e-6)
    assert all(torch.autograd.grad(total(*outputs), outputs)[i].shape == s for i, s in enumerate(shapes))


def test_an_image_without_objects_teaches_objectness_alone():
    outputs = [o.requires_grad_() for o in raw(2, seed=2)]
    parts = yolo_loss(outputs, [objects(), objects()], PRIORS, STRIDES)
    assert parts["box"].item() == parts["classes"].item() == 0
    sum(parts.values()).backward()
    expected = sum(F.binary_cross_entropy_with_logits(o[:, 4], 0 * o[:, 4], reduction="sum") for o in outputs) / 2
    torch.testing.assert_close(parts["objectness"], expected)
    for output in outputs:
        assert (output.grad[:, 4] != 0).all() and output.grad[:, [0, 1, 2, 3, 5, 6]].abs().sum() == 0


def test_the_loss_of_a_batch_is_the_mean_of_its_images():
    outputs, targets = raw(2, seed=4), TARGETS["objects in both"]
    both = yolo_loss(outputs, targets, PRIORS, STRIDES)
    single = [yolo_loss([o[i : i + 1] for o in outputs], targets[i : i + 1], PRIORS, STRIDES) for i in (0, 1)]
    for key in both:
        assert both[key].item() == pytest.approx(sum(s[key].item() for s in single) / 2)
