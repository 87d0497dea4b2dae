"""Every torchvision classification network with BatchNorm, ties together and apart, in eval and train mode.

Aligned: test_aligned.py.
"""

import re

import pytest
import torch
from exactness import assert_exact, empty_sides, randomise, widen
from test_own_networks import check_planted, plant
from torchvision import models as zoo

import slimming
from slimming.channels.inputs import tensors_in

WITHOUT_BATCHNORM = re.compile("alexnet|convnext|squeezenet|swin|vit_|vgg[0-9]+$")
HUGE = {"regnet_y_128gf", "regnet_y_32gf", "regnet_x_32gf", "vgg13_bn", "vgg16_bn", "vgg19_bn", "wide_resnet101_2"}
HUGE |= {"efficientnet_v2_l"}  # over 100M parameters: in benchmarks/prune_speed.py
NAMES = [n for n in zoo.list_models(module=zoo) if not WITHOUT_BATCHNORM.match(n)]
SIZES = {"maxvit_t": 224, "inception_v3": 299}


def build(name: str):
    torch.manual_seed(0)
    told = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = randomise(zoo.get_model(name, weights=None, **told))
    return model, torch.randn(1, 3, SIZES.get(name, 64), SIZES.get(name, 64), dtype=torch.float64)


def test_there_are_58():
    assert len(NAMES) == 58 and set(NAMES) > HUGE


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n not in HUGE])
def test_pruned_equals_masked(name):
    model, example = build(name)
    graph = slimming.trace(model, example)
    for ties in ("together", "apart"):
        plan = graph.plan(slimming.GlobalRatio(0.5), ties=ties)
        thin = assert_exact(model, plan, example)
        assert plan.got["macs"] < 0.8 and not empty_sides(thin) and plan.train_watched


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "shufflenet_v2_x0_5", "efficientnet_b0"])
def test_planted_channels(name):
    model, example = build(name)
    planted = plant(model, torch.Generator().manual_seed(3))
    check_planted(model, slimming.trace(model, example), planted, example)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["googlenet", "inception_v3", "shufflenet_v2_x0_5", "mobilenet_v3_small", "regnet_y_400mf"]
)
def test_the_thin_network_takes_a_fine_tuning_step(name):
    model, example = build(name)
    thin = slimming.prune(model, slimming.trace(model, example).plan(slimming.GlobalRatio(0.5))).train()
    loss = sum(t.square().mean() for t in tensors_in(thin(widen(example, 2))))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in thin.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deeplabv3_resnet50", {"aux_loss": True}),
        ("fcn_resnet50", {"aux_loss": True}),
        ("lraspp_mobilenet_v3_large", {}),
    ],
)
def test_segmentation(name, options):
    torch.manual_seed(0)
    model = randomise(zoo.get_model(name, weights=None, weights_backbone=None, num_classes=3, **options))
    example = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    graph = slimming.trace(model, example)
    for ties in ("together", "apart", "aligned"):
        plan = graph.plan(slimming.GlobalRatio(0.5), ties=ties)
        assert_exact(model, plan, example)
        assert plan.got["macs"] < 0.6
