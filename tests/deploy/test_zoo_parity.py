"""Networks of models/ and twenty of torchvision, dense and pruned, as ONNX and as a program of torch, for 1 and 5 images."""

import pytest
import torch
from networks import network, pruned, trained

from slimming import models
from slimming.deploy import format_named
from slimming.deploy.engines import READS, open_engine
from slimming.deploy.proving import prove

OWN = {"vgg": {"depth": 11, "width": 0.25}, "preresnet": {"depth": 11}, "densenet": {"depth": 10}}
OWN |= {"convnet": {"width": 0.25}, "mlp": {}}
TORCHVISION = [
    "vgg11_bn",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "densenet121",
    "googlenet",
    "inception_v3",
    "mnasnet0_5",
    "mnasnet1_0",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "regnet_y_800mf",
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0",
]
SIDE = {"inception_v3": 299, "googlenet": 96}  # pixels; of all others 64, of our own 32
SAMPLE = {("preresnet", "together"), ("densenet", "dense")}
TIES = ("dense", "together", "apart", "aligned")
CASES = [
    pytest.param(name, ties, marks=() if (name, ties) in SAMPLE else pytest.mark.complete)
    for name in [*OWN, *TORCHVISION, "timm"]
    for ties in TIES
]


def build(name):
    """Return a network with statistics of its own, and the shape of its images."""
    torch.manual_seed(0)
    own = OWN | {"timm": {"name": "mobilenetv3_small_050"}}  # whose BatchNorms have an activation in them
    registered, arguments = (name, own[name]) if name in own else ("torchvision", {"name": name})
    side = 32 if name in OWN else SIDE.get(name, 64)
    return trained(models.build(registered, num_classes=10, in_channels=3, **arguments)), (3, side, side)


def test_there_are_all_of_ours_and_twenty_more():
    detectors = {
        "yolov3",
        "yolov3_tiny",
        "torchvision_detection",
    }  # which have several outputs; see test_detection_stages
    assert OWN.keys() | {"torchvision", "timm"} | detectors == models.REGISTRY.keys()
    assert len(set(TORCHVISION)) == 20


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ties"), CASES)
def test_exported_equals_the_network(name, ties, tmp_path):
    model, image = build(name)
    if ties != "dense":
        model = pruned(model, image, ties)
    batches = [(torch.randn(n, *image), None) for n in (1, 5)]
    for format_name in ("onnx", "torch"):
        chosen = format_named(format_name)
        path = tmp_path / f"model{chosen.SUFFIXES[0]}"
        chosen.write(network(model, image), path)
        assert prove(open_engine(path, READS[path.suffix][0]), model, batches).relative < 1e-4
        path.unlink()  # the complete set would fill a small disk
