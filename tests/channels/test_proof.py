"""What the proof must see besides a wrong number: values that are no numbers, and nothing to compare."""

import pytest
import torch
from exactness import randomise
from torch import nn

import slimming
from slimming import models
from slimming.channels import proof
from slimming.channels.proof import mask, prove, relative_difference
from slimming.errors import PlanError

NAN, INF = float("nan"), float("inf")
ONES = torch.ones(2, 3)


class Net(nn.Module):
    """A small chain; `end` turns the logits into what the network returns."""

    def __init__(self, end=lambda x: x):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
        nn.init.uniform_(self.body[1].weight)
        self.end = end

    def forward(self, x):
        return self.end(self.body(x))


def thin(model, example=None):
    plan = slimming.trace(model, torch.randn(2, 3, 8, 8) if example is None else example).plan(
        slimming.GlobalRatio(0.5)
    )
    return slimming.prune(model, plan, verify=False), plan


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["body.0.weight", "body.1.running_mean", "body.1.weight", "body.3.bias"])
def test_one_value_that_is_not_finite_fails_the_proof(where, value):
    model = Net()
    small, plan = thin(model)
    prove(model, small, plan)
    with torch.no_grad():
        small.state_dict()[where].view(-1)[0] = value
    with pytest.raises(PlanError, match="differs from the masked one"):
        prove(model, small, plan)


def test_a_network_that_is_not_finite_itself_is_named():
    model = Net()
    small, plan = thin(model)
    with torch.no_grad():
        model.body[3].bias[0] = NAN
    with pytest.raises(PlanError, match="the network itself is not finite on this input"):
        slimming.prune(model, plan)
    with pytest.raises(PlanError, match="differs"):  # the thin one is finite, the masked one is not
        prove(model, small, plan)


@pytest.mark.parametrize("end", [lambda x: None, lambda x: x.argmax(1), lambda x: x[:0], lambda x: {"words": "none"}])
def test_a_network_without_float_outputs_cannot_be_proven(end):
    model = Net()
    _, plan = thin(model)
    model.end = end
    with pytest.raises(PlanError, match="no float output to compare"):
        slimming.prune(model, plan)
    assert slimming.prune(model, plan, verify=False).body[1].num_features < 8


def test_a_plan_that_changes_nothing_is_proven_where_layers_are_compared():
    model = models.build("convnet", width=0.125)
    plan = slimming.trace(model, torch.randn(1, 3, 32, 32)).plan(slimming.GlobalRatio(0.0))
    plan.compare = "layers"
    assert not plan.layers
    prove(model, mask(model, plan), plan)


@pytest.mark.parametrize("value", [NAN, INF])
def test_relative_difference(value):
    assert relative_difference([ONES, 2 * ONES], [ONES, ONES]) == 1
    assert relative_difference([ONES], [ONES[:1]]) == relative_difference([ONES], []) == INF
    bad = ONES.clone()
    bad[1, 2] = value
    assert relative_difference([ONES, bad], [ONES, ONES]) == relative_difference([ONES], [bad]) == INF
    assert relative_difference([ONES, bad, bad], [ONES, ONES, bad]) == INF
    assert relative_difference([ONES[:0], ONES], [ONES[:0], ONES]) == 0
    with pytest.raises(PlanError, match="itself is not finite"):
        relative_difference([ONES, bad], [ONES, bad])
    for nothing in ([], [ONES[:0]]):
        with pytest.raises(PlanError, match="no float output to compare"):
            relative_difference(nothing, nothing)


class LoudOnLargeInputs(nn.Sequential):
    """Makes rounding large where its input is large, as attention does: sin(300,000 y^5)."""

    def __init__(self):
        layers = [nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(*layers, nn.Linear(16, 4))

    def forward(self, x):
        return torch.sin(3e5 * super().forward(x) ** 5)


def test_what_a_network_makes_of_rounding_is_no_difference(monkeypatch):
    torch.manual_seed(0)
    model = randomise(LoudOnLargeInputs()).eval()
    small, plan = thin(model, torch.randn(1, 3, 16, 16).double())
    weight = small[5].weight.detach()
    small[5].weight.data = weight * (1 + 2**-50)  # as another order of the sums would
    prove(model, small, plan)
    with monkeypatch.context() as patched, pytest.raises(PlanError, match="differs from the masked one"):
        patched.setattr(proof, "NOISE", 0)
        prove(model, small, plan)
    small[5].weight.data = weight * (1 + 1e-7)  # wrong
    with pytest.raises(PlanError, match="differs from the masked one"):
        prove(model, small, plan)


def asleep(side, fixed):
    """A network, of images of a fixed side or of any, whose first channel is zero behind the ReLU on ordinary inputs."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)]
    model = nn.Sequential(*layers, *[nn.Flatten(), nn.Linear(2 * side**2, 2)] * fixed)
    model[1].weight.data = torch.tensor([1.0, 0.9, 0.1, 0.1])
    model[1].bias.data[0] = -20.0
    return model.double().eval()


@pytest.mark.parametrize(
    ("side", "fixed", "seen"),
    [
        (100, False, [100] * 5),
        (160, False, [160, 96, 96, 96, 96]),
        (160, True, [160, 96, 160, 160, 160, 160]),  # it does not take the part
    ],
)
def test_later_inputs_are_parts_of_large_images_and_wake_what_sleeps(side, fixed, seen):
    model, sides = asleep(side, fixed), []
    small, plan = thin(model, torch.randn(1, 3, side, side).double())
    assert plan.keep["1"] == [0, 1]
    hook = small.register_forward_pre_hook(lambda module, args: sides.append(args[0].shape[-1]))
    prove(model, small, plan)
    hook.remove()
    assert sides == seen
    small[3].weight.data[:, 0] += 1  # it reads the channel that sleeps
    with pytest.raises(PlanError, match="differs from the masked one"):
        prove(model, small, plan)
