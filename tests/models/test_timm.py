"""model=timm: built by name, rebuilt from a checkpoint, and what is said of bad input. Nothing is downloaded."""

import sys

import pytest
import torch
from torch import nn

import slimming
from conftest import compose_config
from slimming import checkpoint, models
from slimming.errors import ConfigError, GraphError
from slimming.models import timm_zoo
from slimming.records import RECORD_FORMAT
from slimming.stages.training import normalised, train

SMALL = ("model=timm", "model.name=test_resnet", "data=digits", "data.image_size=32", "trainer.max_epochs=1")
SMALL += ("trainer.limit_train_batches=2", "trainer.limit_test_batches=1", "trainer.enable_progress_bar=false")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_heads_stems_and_scales_are_as_asked():
    model = models.build("timm", name="resnet10t", num_classes=7, in_channels=1, gamma_init=0.5)
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 7)
    assert all((m.weight == 0.5).all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_a_pruned_one_is_rebuilt_from_its_checkpoint(tmp_path):
    torch.manual_seed(0)
    arguments = {"name": "mobilenetv3_small_050", "weights": "DEFAULT", "num_classes": 3, "in_channels": 1}
    spec = models.spec("timm", arguments)
    assert spec["arguments"]["weights"] is None and "transform_input" not in spec["arguments"]
    model, example = models.build(spec["name"], **spec["arguments"]).eval(), torch.randn(2, 1, 64, 64)
    plan = slimming.trace(model, example).plan(slimming.GlobalRatio(0.4), ties="apart", score="random")
    thin = slimming.prune(model, plan)
    record = {"format": RECORD_FORMAT, "model": spec, "plans": [plan.to_dict()]}
    state = {checkpoint.PREFIX + k: v for k, v in thin.state_dict().items()}
    checkpoint.write({"state_dict": state, "slimming": record}, tmp_path / "pruned.ckpt")
    assert torch.equal(slimming.load(tmp_path / "pruned.ckpt")(example), thin.eval()(example))


def test_fresh_weights_of_a_pruned_one_are_timms_own_at_its_widths():
    arguments = {"name": "resnet10t", "num_classes": 7, "in_channels": 1, "gamma_init": 0.5}
    model = models.build("timm", **arguments).eval()
    plan = slimming.trace(model, torch.randn(1, 1, 64, 64)).plan(slimming.GlobalRatio(0.5), score="random")
    thin = models.redraw(slimming.prune(model, plan), models.spec("timm", arguments | {"weights": "DEFAULT"}))
    for module in (m for m in thin.modules() if isinstance(m, nn.Conv2d)):  # kaiming_normal_, fan_out
        expected = (2 / (module.weight[0, 0].numel() * module.out_channels)) ** 0.5
        assert abs(module.weight.std() / expected - 1) < 5 * (2 * module.weight.numel()) ** -0.5
    assert all((m.weight == 0.5).all() for m in thin.modules() if isinstance(m, nn.BatchNorm2d))


def test_weights_come_from_a_file(tmp_path):
    model = models.build("timm", name="test_resnet", num_classes=5)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    again = models.build("timm", name="test_resnet", num_classes=5, weights=str(tmp_path / "weights.pt"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(ConfigError, match="is not a state dict of test_resnet with this head"):
        models.build("timm", name="test_resnet", num_classes=6, weights=str(tmp_path / "weights.pt"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mobilenetv3_smal_050"}, "did you mean mobilenetv3_small_050"),
        ({"name": "zzzzzz"}, "not a model of timm"),
        ({"name": 3}, "not a model of timm"),
        ({"name": "resnet10t.c3_in1k"}, "set model.name=resnet10t model.weights=c3_in1k"),
        ({"name": "resnet10t", "weights": "a1_in1k"}, "neither a file nor a tag of resnet10t; there are c3_in1k"),
        ({"name": "resnet10t", "weights": "DEFAULT"}, "weights of resnet10t.c3_in1k could not be loaded"),
        ({"name": "resnet10t", "num_classes": 0}, "num_classes must be"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, message):
    with pytest.raises(ConfigError, match=message):
        models.build("timm", **arguments)


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"pip install 'slimming\[timm\]'"):
        models.build("timm", name="resnet10t")


def test_a_network_without_batchnorm_says_what_it_has_instead(tmp_path):
    model = models.build("timm", name="test_convnext")
    with pytest.raises(GraphError, match=r"normalises by LayerNorm \(9 layers\), LayerNorm2d \(5 layers\), whose"):
        slimming.trace(model.eval(), torch.randn(1, 3, 64, 64)).plan(slimming.GlobalRatio(0.5))
    with pytest.raises(ConfigError, match="normalises by LayerNorm"):
        train(compose_config(*SMALL, "model.name=test_convnext", "sparsity=1e-4"), tmp_path)


def test_an_input_size_that_it_refuses(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot process images of 1x32x32: .*set data\.image_size"):
        train(compose_config(*SMALL, "model.name=test_coatnet"), tmp_path)


@pytest.mark.slow
def test_it_trains(tmp_path):
    train(compose_config(*SMALL, "sparsity=1e-4"), tmp_path)
    assert slimming.load(tmp_path / "last.ckpt")(torch.randn(1, 1, 32, 32)).shape == (1, 10)


def test_pretrained_weights_bring_the_normalisation_of_their_images():
    config = compose_config("model=timm", "model.name=mobilenetv3_small_050", "model.weights=lamb_in1k", "data=cifar10")
    assert normalised(config)["mean"] == [0.485, 0.456, 0.406] and normalised(config)["std"] == [0.229, 0.224, 0.225]
    given = compose_config("model=timm", "model.weights=lamb_in1k", "data=cifar10", "data.mean=[0.1,0.2,0.3]")
    assert normalised(given)["mean"] == [0.1, 0.2, 0.3]
    fresh = compose_config("model=timm", "model.name=mobilenetv3_small_050", "data=cifar10")
    assert normalised(fresh)["mean"] is None
    assert timm_zoo.normalisation("tf_efficientnet_b0", "DEFAULT")["mean"] == [0.485, 0.456, 0.406]
