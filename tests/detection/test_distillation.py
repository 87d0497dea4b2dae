"""What a detector learns from another: closed forms, gradients, nothing from its like, and nothing of the background."""

import math

import pytest
import torch

from slimming.detection.distillation import divergence, yolo_distillation
from slimming.detection.predictions import LARGEST_EXPONENT, predictions

PRIORS = (((40.0, 40.0),), ((8.0, 8.0),))
STRIDES = (32, 16)
CLASSES = 2


def raw(seed: int, n: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n, 5 + CLASSES, 2 * s, 2 * s) for s in (1, 2)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def parts(student, teacher, temperature=1.0):
    return yolo_distillation(*(predictions(x, PRIORS, STRIDES) for x in (student, teacher)), temperature)


def test_the_divergence_of_one_logit_by_hand():
    student = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor(3 * math.log(3), dtype=torch.float64)  # at T = 3: chances of 1/2 and 3/4
    found = divergence(student, teacher, 3.0)
    assert found.item() == pytest.approx(9 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)))
    found.backward()
    assert student.grad.item() == pytest.approx(3 * (0.5 - 0.75))


def test_one_prediction_by_hand():
    """One scale of one cell, a teacher that is half sure: each part in closed form."""
    own = torch.zeros(1, 7, 1, 1, dtype=torch.float64)
    other = torch.tensor([0.0, math.log(3), 0.5, 0, 0, math.log(3), 0], dtype=torch.float64).view(1, 7, 1, 1)
    found = yolo_distillation(*(predictions([x], [[(16.0, 16.0)]], [32]) for x in (own, other)), 1.0)
    apart = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)  # chances of 3/4 and 1/2
    share = 16 * math.exp(0.5) * 16 / 32**2
    assert found["box"].item() == pytest.approx(0.5 * (2 - share) * (apart + 0.5**2 / 2))
    assert found["classes"].item() == pytest.approx(0.5 * apart)
    assert found["objectness"].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_nothing_is_learned_from_ones_like(temperature):
    student, teacher = ([x.requires_grad_() for x in raw(0)] for _ in range(2))
    found = parts(student, teacher, temperature)
    assert all(value.item() == 0 for value in found.values())
    for gradient in torch.autograd.grad(sum(found.values()), student):
        assert gradient.abs().max() < 1e-12


def test_the_gradients_are_those_of_finite_differences():
    teacher = raw(1, 1)
    assert torch.autograd.gradcheck(
        lambda *x: tuple(parts(x, teacher, 2.0).values()), [x.requires_grad_() for x in raw(2, 1)]
    )


def test_the_background_teaches_that_it_is_background_alone():
    """Where the teacher sees no object, nothing but the student's objectness gets a gradient."""
    student, teacher = [x.requires_grad_() for x in raw(3)], raw(4)
    for scale in teacher:
        scale[:, 4] = -math.inf
        scale[0, 4, 0, 0] = 2.0
    found = parts(student, [t.clamp(min=-800) for t in teacher])
    gradients = torch.autograd.grad(sum(found.values()), student)
    for gradient in gradients:
        others = gradient[:, [0, 1, 2, 3, 5, 6]]
        assert (others[0, :, 0, 0] != 0).all() and others.count_nonzero() == 6
        assert (gradient[:, 4] != 0).all()


def test_a_teacher_with_boxes_without_bounds_teaches_the_largest_that_there_are():
    student, teacher, bounded = raw(5), raw(6), raw(6)
    for wild, tame in zip(teacher, bounded, strict=True):
        wild[:, 2:4] *= 1e6
        tame[:, 2:4] = wild[:, 2:4].clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
    assert parts(student, teacher) == parts(student, bounded)
