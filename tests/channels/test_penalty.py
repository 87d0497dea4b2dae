"""The penalty by itself: its value, its gradient, which gammas."""

import pytest
import torch
from torch import nn

from slimming import models
from slimming.channels.penalty import Penalty, batchnorm_gammas, near_zero_share
from slimming.errors import ConfigError


@pytest.fixture
def gammas():
    torch.manual_seed(0)
    values = [torch.randn(5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)]
    values[0][2] = 0.0
    return {str(i): nn.Parameter(v) for i, v in enumerate(values)}


@pytest.mark.parametrize("factor", [1.0, 0.25, torch.tensor(4.0)])
def test_gradient_is_that_of_autograd(gammas, factor):
    penalty = Penalty(gammas, 0.3)
    loss = 0.3 * sum(g.abs().sum() for g in gammas.values()) * factor
    expected = torch.autograd.grad(loss, list(gammas.values()))
    penalty.add_gradient(factor)
    assert all(torch.allclose(g.grad, e, rtol=1e-12) for g, e in zip(gammas.values(), expected, strict=True))
    assert gammas["0"].grad[2] == 0


def test_gradients_that_are_there_are_added_to(gammas):
    for g in gammas.values():
        g.grad = torch.ones_like(g)
    Penalty(gammas, 0.5).add_gradient()
    assert all(torch.equal(g.grad, 1 + 0.5 * g.sign()) for g in gammas.values())


def test_no_sparsity_leaves_missing_gradients_missing(gammas):
    Penalty(gammas, 0.0).add_gradient()
    assert all(g.grad is None for g in gammas.values())


def test_value(gammas):
    expected = 0.3 * sum(float(g.detach().abs().sum()) for g in gammas.values())
    assert float(Penalty(gammas, 0.3).value()) == pytest.approx(expected, rel=1e-12)
    assert float(Penalty({}, 0.3).value()) == 0


def test_all_trainable_batchnorm_scales_are_found_once():
    shared = nn.BatchNorm2d(3)
    frozen = nn.BatchNorm1d(3)
    frozen.weight.requires_grad_(False)
    parts = [shared, shared, frozen, nn.BatchNorm3d(2), nn.BatchNorm2d(3, affine=False), nn.GroupNorm(1, 3)]
    assert list(batchnorm_gammas(nn.Sequential(*parts))) == ["0", "3"]


def test_layers_are_chosen_by_pattern():
    model = models.preresnet(20)
    chosen = batchnorm_gammas(model, ["layer1.*.bn2", "bn"])
    assert list(chosen) == ["layer1.0.bn2", "layer1.1.bn2", "bn"]
    with pytest.raises(ConfigError, match=r"penalty.layers: 'layer9\.\*' matches no BatchNorm"):
        batchnorm_gammas(model, ["bn", "layer9.*"])


def test_share_near_zero():
    assert near_zero_share(torch.tensor([1.0, 0.5, 0.009, 0.0])) == 0.5
    assert near_zero_share(torch.empty(0)) == 0.0


def test_reach_of_the_papers_vgg():
    lr_sum = 782 * (80 * 0.1 + 40 * 0.01 + 40 * 0.001)
    assert 1e-4 * Penalty({}, 0).reach(lr_sum, 0.9) == pytest.approx(6.6, abs=0.01)


def test_reach_is_how_far_sgd_moves_an_ignored_gamma():
    gamma = nn.Parameter(torch.tensor([100.0], dtype=torch.float64))
    penalty, optimizer = Penalty({"": gamma}, 0.01), torch.optim.SGD([gamma], lr=0.1, momentum=0.9)
    for _ in range(2000):
        optimizer.zero_grad()
        penalty.add_gradient()
        optimizer.step()
    assert 100 - float(gamma.detach()) == pytest.approx(0.01 * Penalty({}, 0).reach(0.1 * 2000, 0.9), rel=0.01)
