"""sparsity=auto: lambda follows the gammas to the asked share."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from conftest import compose_config
from slimming.channels.penalty import Penalty, near_zero_share
from slimming.errors import ConfigError
from slimming.training.steering import CHANGE, STRONGEST, Steering

RATES = [0.1] * 20 + [0.01] * 10 + [0.001] * 10
STEPS, MOMENTUM = 30, 0.9


def steered(target: float, resistance: torch.Tensor, rates: list[float] = RATES) -> tuple[Penalty, list[float]]:
    """Let gammas that start at 0.5 feel the penalty against a force of the loss each, and return the lambdas of all epochs."""
    penalty = Penalty({"norm": nn.Parameter(torch.full((len(resistance),), 0.5))}, 0.0)
    steering = Steering(penalty, target, rates, MOMENTUM)
    steering.on_train_start(SimpleNamespace(num_training_batches=STEPS, accumulate_grad_batches=1), None)
    gammas, lambdas = penalty.gammas["norm"].data, []
    for epoch, rate in enumerate(rates):
        for step in range(STEPS):
            steering.on_train_batch_start(SimpleNamespace(global_step=epoch * STEPS + step), None, None, step)
            force = penalty.sparsity * gammas.sign() - resistance * (gammas > 1e-3)  # what is at zero stays there
            gammas -= rate / (1 - MOMENTUM) * force
            gammas[gammas.abs() < rate / (1 - MOMENTUM) * penalty.sparsity] = 0  # a subgradient's swing around zero
        lambdas.append(penalty.sparsity)
    return penalty, lambdas


@pytest.mark.parametrize("target", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_the_asked_share_reaches_zero_whatever_the_loss_holds_against_it(target):
    resistance = torch.linspace(0, 4e-3, 1000)
    penalty, lambdas = steered(target, resistance)
    assert near_zero_share(penalty.flat()) == pytest.approx(target, abs=0.03)
    assert max(lambdas) > target * 4e-3  # it had to overcome the resistance of that gamma


def test_without_resistance_the_first_lambda_is_the_maximum_shrinkages():
    penalty, lambdas = steered(0.5, torch.zeros(100))
    total = sum(RATES) * STEPS / (1 - MOMENTUM)
    assert lambdas[0] == pytest.approx(0.5 / (total / 6))
    assert penalty.flat().max() < 1e-3


def test_lambda_is_bounded_where_the_target_cannot_be_reached():
    _, lambdas = steered(0.5, torch.full((100,), 1e3))
    steps = [b / a for a, b in pairwise(lambdas)]
    assert max(steps) <= CHANGE * 1.0001 and min(steps) >= 1 / CHANGE * 0.9999
    assert max(lambdas) == pytest.approx(STRONGEST * 0.5 / (0.1 / (1 - MOMENTUM) * STEPS))


def test_short_trainings_look_more_often_than_once_an_epoch():
    _, many = steered(0.5, torch.linspace(0, 4e-3, 1000), RATES)
    penalty, few = steered(0.5, torch.linspace(0, 4e-2, 1000), [0.1, 0.1, 0.1, 0.01])
    assert len(set(many)) > 10 and len(few) == 4
    assert near_zero_share(penalty.flat()) == pytest.approx(0.5, abs=0.05)


def test_gammas_that_come_back_are_brought_down_again_in_a_long_training():
    """Where lambda fell to nothing, it would take as many looks to be back as it took to fall."""
    penalty = Penalty({"norm": nn.Parameter(torch.full((100,), 0.5))}, 0.0)
    steering = Steering(penalty, 0.5, [0.1] * 160, MOMENTUM)
    steering.on_train_start(SimpleNamespace(num_training_batches=STEPS, accumulate_grad_batches=1), None)
    gammas, shares = penalty.gammas["norm"].data, []
    for epoch in range(160):
        steering.look(epoch * STEPS)
        back = 4e-3 if epoch > 110 else 0.0  # the loss wants them back
        gammas[:60] = (gammas[:60] - 30 * penalty.sparsity + back).clamp(0, 0.5)
        shares.append(near_zero_share(penalty.flat()))
    assert min(shares[90:111]) >= 0.5
    away = next(epoch for epoch in range(111, 160) if shares[epoch] < 0.5)
    assert any(share >= 0.5 for share in shares[away : away + 15]), "lambda is there again within 15 looks"


def test_a_rate_of_zero_changes_nothing():
    _, lambdas = steered(0.5, torch.linspace(0, 4e-3, 100), [0.1, 0.0, 0.1] * 10)
    assert all(torch.isfinite(torch.tensor(lambdas)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sparsity": "auto"}, "sparsity=auto needs target_ratio"),
        ({"sparsity": "auto", "target_ratio": 1.0}, "target_ratio must be a number > 0 and < 1, got 1.0"),
        ({"sparsity": 1e-4, "target_ratio": 0.5}, "target_ratio=0.5 is for sparsity=auto"),
        ({"sparsity": "auto", "target_ratio": 0.5, "penalty": "polarization"}, "for penalty=l1, proximal or group"),
        ({"sparsity": "high"}, "sparsity must be auto or a number >= 0, got 'high'"),
    ],
)
def test_wrong_values(given, message):
    with pytest.raises(ConfigError, match=message):
        compose_config(*(f"{key}={value}" for key, value in given.items()))


def test_the_pipeline_aims_at_its_largest_ratio():
    slim = compose_config("sparsity=auto", "ratio=[0.4,0.6]", name="slim")
    assert slim.target_ratio == 0.6
    assert compose_config("sparsity=auto", "ratio=0.6", "target_ratio=0.5", name="slim").target_ratio == 0.5
