"""YOLOv3 and its tiny form: sizes, outputs, priors, fresh weights, pruned exactly."""

import math

import pytest
import torch
from torch import nn

import slimming
from slimming import models
from slimming.errors import ConfigError
from slimming.models.yolov3 import PRIORS

NARROW = {"width": 1 / 16, "num_classes": 3, "image_size": 64}
NAMES = ["yolov3", "yolov3_tiny"]


@pytest.mark.parametrize(
    ("name", "classes", "num_params"),
    [
        ("yolov3", 1, 61_523_734),
        ("yolov3", 80, 61_949_149),
        ("yolov3_tiny", 1, 8_669_876),
        ("yolov3_tiny", 80, 8_852_366),
    ],
)
def test_sizes_are_the_published_ones(name, classes, num_params):
    with torch.device("meta"):
        model = models.build(name, num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == num_params


@pytest.mark.parametrize(("name", "strides"), [("yolov3", (32, 16, 8)), ("yolov3_tiny", (32, 16))])
def test_outputs_are_raw_and_the_coarsest_comes_first(name, strides):
    outputs = models.build(name, **NARROW, in_channels=1).eval()(torch.zeros(2, 1, 96, 160))
    assert [tuple(o.shape) for o in outputs] == [(2, 3 * (5 + 3), 96 // s, 160 // s) for s in strides]


def test_the_papers_priors_are_shared_out_and_scaled():
    assert models.yolov3(**NARROW | {"image_size": 416}).priors == (
        ((116, 90), (156, 198), (373, 326)),
        ((30, 61), (62, 45), (59, 119)),
        ((10, 13), (16, 30), (33, 23)),
    )
    assert models.yolov3(**NARROW | {"image_size": 208}).priors[2][0] == (5, 6.5)
    own = [[40, 40], [5, 5], [10, 10], [20, 20]]
    model = models.yolov3_tiny(**NARROW, priors=own)
    assert model.priors == (((20, 20), (40, 40)), ((5, 5), (10, 10))) and model.out_channels == 2 * 8


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_network_expects_no_objects(name):
    model = models.build(name, **NARROW, gamma_init=0.25)
    outputs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.bias is not None]
    assert len(outputs) == len(model.strides)
    for layer in outputs:
        bias = layer.bias.view(3, -1)
        assert bias[:, 4].sigmoid().tolist() == pytest.approx([0.01] * 3)
        assert (bias[:, [0, 1, 2, 3, 5, 6, 7]] == 0).all()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 0.25).all() and (module.bias == 0).all()


@pytest.mark.parametrize("size", [(97, 130), (64, 80), (416, 400)])
def test_a_size_that_does_not_divide_into_cells_is_named(size):
    with pytest.raises(ConfigError, match=f"multiples of 32 pixels, got {size[0]}x{size[1]}: set data.image_size"):
        models.yolov3_tiny(**NARROW)(torch.zeros(1, 3, *size))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("yolov3", {"priors": PRIORS[:4]}, "do not fit the 3 scales of this network: give 3 x n pairs"),
        ("yolov3", {"priors": []}, "do not fit the 3 scales"),
        ("yolov3_tiny", {"priors": [[1, 2], [3, 4, 5]]}, "do not fit the 2 scales"),
        ("yolov3_tiny", {"priors": [[1, 0], [3, 4]]}, "each number of model.priors .* > 0 and <= 64, got 0"),
        ("yolov3_tiny", {"priors": [[1, 65], [3, 4]]}, "<= 64, got 65"),
        ("yolov3", {"width": 0}, "model.width must be a number > 0, got 0"),
        ("yolov3", {"num_classes": 0}, "num_classes .* got 0"),
        ("yolov3", {"image_size": 0}, "data.image_size .* got 0"),
    ],
)
def test_bad_values_are_named(name, arguments, message):
    with pytest.raises(ConfigError, match=message):
        models.build(name, **NARROW | arguments)


@pytest.mark.parametrize("name", NAMES)
def test_fresh_weights_of_a_pruned_one_are_those_of_its_widths(name):
    torch.manual_seed(0)
    arguments = NARROW | {"width": 0.25}
    model = models.build(name, **arguments).eval()
    plan = slimming.trace(model, torch.randn(1, 3, 64, 64)).plan(slimming.GlobalRatio(0.5), score="random")
    thin = models.redraw(slimming.prune(model, plan, verify=False), {"name": name, "arguments": arguments})
    for layer in (m for m in thin.modules() if isinstance(m, nn.Conv2d)):
        expected = math.sqrt(2 / (layer.kernel_size[0] ** 2 * layer.out_channels))
        assert abs(layer.weight.std() / expected - 1) < 5 * (2 * layer.weight.numel()) ** -0.5
        if layer.bias is not None:
            assert layer.bias.view(3, -1)[:, 4].sigmoid().tolist() == pytest.approx([0.01] * 3)


def objects(*boxes: list[float]) -> dict[str, torch.Tensor]:
    return {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.zeros(len(boxes), dtype=torch.long)}


@pytest.mark.parametrize("name", NAMES)
def test_a_network_learns_its_batch_by_heart(name):
    """One class, three images, one of them without objects: what is found in the end are the objects."""
    torch.manual_seed(0)
    model = models.build(name, width=1 / 16, num_classes=1, image_size=64)
    images, targets = torch.randn(3, 3, 64, 64), [objects([4, 6, 30, 40.0]), objects(), objects([33, 30, 43, 38.0])]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(120):
        loss = sum(model.loss(model(images), targets, (64, 64)).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.train()  # three images are too few for running statistics
    found = model.detections(model(images), (64, 64))
    for own, target in zip(found, targets, strict=True):
        sure = own["scores"] > 0.5
        assert int(sure.sum()) == len(target["boxes"])
        torch.testing.assert_close(own["boxes"][sure], target["boxes"], atol=2.5, rtol=0)
