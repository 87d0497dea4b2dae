"""Sizes of the networks, pinned; and that any of them runs on what it says."""

import re

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from slimming import models
from slimming.channels.cost import cost
from slimming.channels.penalty import batchnorm_gammas
from slimming.errors import ConfigError

TABLE_5 = [22, 62, "M", 83, 119, "M", 193, 168, 85, 40, "M", 32, 32, 32, 32, "M", 32, 32, 32, 38]
PORT_70 = [49, 64, "M", 128, 128, "M", 256, 256, 249, 208, "M", 116, 38, 18, 8, "M", 14, 9, 16, 94]
SIZES = [  # name, arguments, parameters, MACs at 32x32 (28x28 for the MLP), gammas
    ("vgg", {"depth": 11}, 9_228_362, 152_769_536, 2_752),
    ("vgg", {"depth": 13}, 9_413_066, 228_267_008, 2_944),
    ("vgg", {"depth": 16}, 14_724_042, 313_201_664, 4_224),
    ("vgg", {"depth": 19}, 20_035_018, 398_136_320, 5_504),
    ("vgg", {"widths": TABLE_5}, 885_934, 90_662_204, 1_034),
    ("vgg", {"widths": PORT_70}, 2_460_793, 214_348_324, 1_651),
    ("preresnet", {"depth": 20}, 219_482, 33_737_216, 1_360),
    ("preresnet", {"depth": 56}, 590_426, 87_214_592, 4_048),
    ("preresnet", {"depth": 110}, 1_146_842, 167_430_656, 8_080),
    ("preresnet", {"depth": 164}, 1_703_258, 247_646_720, 12_112),
    ("densenet", {"init_channels": 16}, 1_019_722, 264_812_928, 9_048),
    ("densenet", {"init_channels": 24}, 1_059_298, 282_917_328, 9_360),
    ("convnet", {}, 21_217_738, 2_908_432_384, 4_480),
    ("mlp", {}, 546_610, 545_000, 800),
]
OWN = [(n, a) for n, a, *_ in SIZES]


def example(name: str, n: int = 1) -> torch.Tensor:
    return torch.zeros(n, 1, 28, 28) if name == "mlp" else torch.zeros(n, 3, 32, 32)


@pytest.mark.parametrize(("name", "arguments", "num_params", "macs", "gammas"), SIZES)
def test_sizes_are_the_published_ones(name, arguments, num_params, macs, gammas):
    model = models.build(name, **arguments)
    counted = cost(model, example(name))
    assert counted.num_params == num_params
    assert counted.macs == macs
    assert sum(map(len, batchnorm_gammas(model).values())) == gammas


@pytest.mark.parametrize(("name", "arguments"), OWN)
def test_macs_equal_those_of_torch(name, arguments):
    model = models.build(name, **arguments).eval()
    with FlopCounterMode(display=False) as counter:
        model(example(name, 2))
    counted = cost(model, example(name, 2))
    assert counted.macs * 2 * 2 == counter.get_total_flops()
    assert sum(counted.layers.values()) == counted.macs and "" not in counted.layers


@pytest.mark.parametrize(("name", "arguments"), OWN)
def test_classes_channels_and_image_size_are_free(name, arguments):
    model = models.build(name, **arguments, num_classes=7, in_channels=2).eval()
    assert model(torch.zeros(2, 2, 48, 48)).shape == (2, 7)


@pytest.mark.parametrize(("name", "arguments"), OWN)
def test_initialisation_is_the_papers(name, arguments):
    torch.manual_seed(0)
    model = models.build(name, **arguments, gamma_init=0.25)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert (module.weight == 0.25).all() and (module.bias == 0).all()
        elif isinstance(module, nn.Conv2d):
            k = module.kernel_size[0]
            expected = (2 / (k * k * module.out_channels)) ** 0.5
            spread = module.weight.numel() ** -0.5  # relative error of an estimated deviation is ~ sqrt(1 / 2n)
            assert abs(module.weight.std() / expected - 1) < 4 * spread
        elif isinstance(module, nn.Linear):
            assert abs(module.weight.std() / 0.01 - 1) < 0.2 and (module.bias is None or (module.bias == 0).all())


def test_width_multiplies_every_layer():
    assert [m.out_channels for m in models.vgg(width=0.25).modules() if isinstance(m, nn.Conv2d)][:3] == [16, 16, 32]


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("vgg", {"depth": 12}, "model.depth must be one of 11, 13, 16, 19; got 12"),
        ("vgg", {"width": "high"}, "model.width must be a number > 0, got 'high'"),
        ("vgg", {"width": 0}, "model.width must be a number > 0, got 0"),
        ("vgg", {"widths": [8, "N"]}, "widths.* got 'N'"),
        ("vgg", {"widths": ["M"]}, "at least one convolution"),
        ("vgg", {"widths": [8], "width": 2}, "exclude each other"),
        ("vgg", {"num_classes": 0}, "num_classes .* got 0"),
        ("preresnet", {"depth": 21}, "9n \\+ 2"),
        ("densenet", {"depth": 41}, "3n \\+ 4"),
        ("densenet", {"growth": 1.5}, "model.growth .* got 1.5"),
        ("mlp", {"widths": [0]}, "got 0"),
        ("torchvision", {"name": "mobilenetv2"}, "did you mean mobilenet_v2"),
        ("torchvision", {"name": "resnet18", "weights": "NONE"}, "IMAGENET1K_V1"),
        ("lenet", {}, "no model is registered as 'lenet'"),
    ],
)
def test_bad_values_are_named(name, arguments, words):
    with pytest.raises(ConfigError, match=words):
        models.build(name, **arguments)


WITHOUT_BATCHNORM = re.compile("alexnet|convnext|squeezenet|swin|vit_|vgg[0-9]+$")


def _with_batchnorm() -> list[str]:
    from torchvision import models as zoo

    return [n for n in zoo.list_models(module=zoo) if not WITHOUT_BATCHNORM.match(n)]


def test_every_torchvision_network_with_batchnorm_takes_the_heads_of_the_data(monkeypatch):
    for name in dir(nn.init):
        if name.endswith("_") and not name.startswith("_"):  # untouched memory costs nothing, even 645M parameters
            monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
    names = _with_batchnorm()
    assert len(names) == 58
    for name in names:
        model = models.build("torchvision", name=name, num_classes=7, in_channels=1)
        assert batchnorm_gammas(model), name
        outputs = [m.out_features for m in model.modules() if isinstance(m, nn.Linear)]
        assert 1000 not in outputs and 7 in outputs, name
        assert next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels == 1, name


def test_torchvision_weights_from_a_file(tmp_path):
    source = models.torchvision("mobilenet_v2", num_classes=1000)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = models.torchvision("mobilenet_v2", weights=str(tmp_path / "w.pth"), num_classes=5, in_channels=1)
    assert torch.equal(model.features[5].conv[1][0].weight, source.features[5].conv[1][0].weight)
    grey = torch.randn(1, 1, 32, 32)
    torch.testing.assert_close(model.eval().features(grey), source.eval().features(grey.expand(1, 3, 32, 32)))
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="not a state dict of mobilenet_v2"):
        models.torchvision("mobilenet_v2", weights=str(tmp_path / "bad.pth"))


def test_torchvision_weights_without_a_network_say_where_to_put_them(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(ConfigError, match=r"no network.*fetch https://.*checkpoints"):
        models.torchvision("mobilenet_v2", weights="DEFAULT")


def test_gamma_init_of_torchvision_networks():
    gammas = batchnorm_gammas(models.torchvision("resnet18", gamma_init=0.5))
    assert all((g == 0.5).all() for g in gammas.values())
    assert all((g == 1).all() for g in batchnorm_gammas(models.torchvision("resnet18")).values())
