"""The module and its schedules."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from slimming import models
from slimming.errors import ConfigError, TrainingError
from slimming.training.module import SlimmingModule
from slimming.training.schedules import lr_per_epoch, multistep, sgd_momentum


class Fixed(nn.Module):
    """Answers every batch with the same output."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, images):
        return self.output


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4)


@pytest.mark.parametrize("decay", [True, False])
def test_weight_decay_of_gamma_and_beta_is_a_switch(decay):
    model = models.vgg(widths=[4, "M", 6])
    groups = SlimmingModule(model, 10, sgd, decay_batchnorm=decay).configure_optimizers().param_groups
    decayed = {p for g in groups if g["weight_decay"] for p in g["params"]}
    norms = {p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    assert decayed == set(model.parameters()) - (set() if decay else norms)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


@pytest.mark.parametrize(("name", "weight", "heads"), [("googlenet", 0.3, 2), ("inception_v3", 0.4, 1)])
def test_auxiliary_heads_have_their_papers_weight(name, weight, heads):
    outputs = torch.randn(1 + heads, 4, 10)
    kind = {"googlenet": "GoogLeNetOutputs", "inception_v3": "InceptionOutputs"}[name]
    from torchvision import models as zoo

    output = getattr(zoo, kind)(*outputs)
    module = SlimmingModule(Fixed(output), 10, sgd)
    module.begin("train")
    labels = torch.arange(4)
    loss = module.training_step((torch.zeros(4), labels), 0)
    expected = F.cross_entropy(outputs[0], labels) + weight * sum(F.cross_entropy(o, labels) for o in outputs[1:])
    torch.testing.assert_close(loss, expected)


def test_googlenet_and_inception_give_named_tuples_in_train_mode():
    with torch.device("meta"):
        for name, size, heads in (("googlenet", 64, 2), ("inception_v3", 299, 1)):
            output = models.torchvision(name).train()(torch.zeros(2, 3, size, size))
            assert len([o for o in output[1:] if o is not None]) == heads


def test_multistep_divides_at_half_and_three_quarters():
    rates = lr_per_epoch(sgd, lambda o: multistep(o, 160), 160)
    assert rates == pytest.approx([0.1] * 80 + [0.01] * 40 + [0.001] * 40)
    with pytest.raises(ConfigError, match="milestones"):
        lr_per_epoch(sgd, lambda o: multistep(o, 160, [80, 120]), 160)


def test_momentum_is_known_for_sgd_alone():
    assert sgd_momentum(sgd) == 0.9
    assert sgd_momentum(torch.optim.AdamW) is None


def test_a_loss_that_is_not_finite_is_named_by_its_first_step():
    module = SlimmingModule(nn.Linear(1, 1), 10, sgd)
    module.trainer = SimpleNamespace(current_epoch=2)
    for step, loss in enumerate([1.0, 2.0, float("nan"), 1.0, float("inf")]):
        module.watch_loss(torch.tensor(loss), step)
    with pytest.raises(TrainingError, match="epoch 3, step 2"):
        module.check_finite()


def test_a_weight_that_is_not_finite_is_an_error():
    module = SlimmingModule(nn.Linear(1, 1), 10, sgd)
    module.trainer = SimpleNamespace(current_epoch=0)
    module.check_finite()
    nn.init.constant_(module.model.weight, float("inf"))
    with pytest.raises(TrainingError, match="a weight became NaN or infinite in epoch 1"):
        module.check_finite()
