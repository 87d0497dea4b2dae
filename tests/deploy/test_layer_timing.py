"""The table of a network's layers: what is timed, as what, and what the times become. The clock is not real."""

import itertools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from small_networks import small_vgg
from torch import nn
from torchvision.models import mobilenet_v2

import slimming
from slimming import models
from slimming.deploy import layer_timing, onnx_format
from slimming.deploy.capturing import Network
from slimming.deploy.layer_timing import Layer, layers_of, time_layers
from slimming.records import Record

CONV = ((3, 3), (1, 1), (1, 1), (1, 1))
LAYERS = {
    "conv": Layer("conv", CONV, 1, (1, 8, 9, 9), 16),
    "strided, dilated": Layer("conv", ((3, 3), (2, 2), (2, 2), (2, 2)), 1, (1, 8, 9, 9), 16),
    "padding same": Layer("conv", ((4, 3), (1, 1), "same", (1, 1)), 1, (1, 8, 9, 9), 16),
    "padding valid": Layer("conv", ((3, 3), (1, 1), "valid", (1, 1)), 1, (1, 8, 9, 9), 16),
    "one axis": Layer("conv", ((3,), (1,), (1,), (1,)), 1, (1, 8, 9), 16),
    "depthwise": Layer("depthwise", CONV, 1, (1, 16, 9, 9), 16),
    "grouped": Layer("grouped", CONV, 4, (1, 8, 9, 9), 16),
    "linear": Layer("linear", (), 1, (1, 8), 16),
    "linear of tokens": Layer("linear", (), 1, (1, 5, 8), 16),
    "norm": Layer("norm", (), 1, (1, 16, 9, 9), 16),
    "norm of features": Layer("norm", (), 1, (1, 16), 16),
}


def graph_of(model, size=32):
    return slimming.trace(model.eval(), torch.zeros(1, 3, size, size))


class Clock:
    """A clock that every look at it moves on; each pass takes what `pace` says of the passes before it."""

    def __init__(self, pace=lambda count: 1e-3):
        self.now, self.looks, self.pace = 0.0, 0, pace

    def __call__(self):
        self.looks += 1
        self.now += self.pace(self.looks)
        return self.now


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_engines_time_the_layer_that_torch_has(layer):
    torch.manual_seed(0)
    model = layer.network(8, 16, normed=True).eval()
    images = layer.images(3, 8, 16)
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)  # an addition that is not timed
        if hasattr(module, "running_var"):
            nn.init.uniform_(module.weight)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    session = onnxruntime.InferenceSession(layer_timing._onnx(model, images.shape), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(session.run(None, {"x0": images})[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "depth"), [("preresnet", 20), ("densenet", 22)])
def test_a_batchnorm_is_timed_where_the_engine_does_not_fold_it(name, depth, tmp_path):
    model = models.build(name, depth=depth, num_classes=10, in_channels=3)
    graph = graph_of(model)
    onnx_format.write(Network(model, (3, 32, 32), Record(None)), tmp_path / "a.onnx")
    left = sum(node.op_type == "BatchNormalization" for node in onnx.load(tmp_path / "a.onnx").graph.node)
    for engine, count in {"torch": len(graph.norms), "onnxruntime": left, "openvino": left}.items():
        layers = layers_of(graph, (3, 32, 32), engine)
        assert sum(layer.kind == "norm" for layer in layers.values()) == count, engine
    assert left > 0
    assert not any(
        layer.kind == "norm" for layer in layers_of(graph_of(small_vgg(), 8), (3, 8, 8), "openvino").values()
    )


def test_layers_of_one_kind_and_size_are_timed_once():
    graph = graph_of(models.build("preresnet", depth=20, num_classes=10, in_channels=3))
    layers = layers_of(graph, (3, 32, 32), "onnxruntime")
    convs = {name: layer for name, layer in layers.items() if layer.kind == "conv"}
    assert len(convs) == sum(isinstance(m, nn.Conv2d) for m in graph.model.modules())
    assert len(set(convs.values())) < len(convs)
    tables = time_layers(convs, "torch", 1, 1, Clock())
    assert len({id(table) for table in tables.values()}) == len(set(convs.values()))


def test_depthwise_convolutions_have_one_width():
    layers = layers_of(graph_of(mobilenet_v2()), (3, 32, 32), "onnxruntime")
    found = {layer.kind for layer in layers.values()}
    assert found == {"conv", "depthwise", "linear"}
    assert layers["features.2.conv.1.0"].axes() == ([96], [16, 32, 48, 96])


@pytest.mark.parametrize(
    ("width", "groups", "axis"),
    [(512, 1, [64, 128, 256, 512]), (64, 1, [16, 32, 64]), (16, 1, [8, 16]), (3, 1, [3]), (100, 1, [16, 32, 48, 100])],
)
def test_widths_that_are_timed(width, groups, axis):
    assert layer_timing._axis(width, groups) == axis


def test_a_table_takes_the_shortest_pass_and_never_more_for_fewer_channels():
    layer = LAYERS["conv"]
    ms = {(8, 8): 5.0, (8, 16): 3.0, (16, 8): 4.0, (16, 16): 4.0}
    table = layer_timing._table(Layer("conv", CONV, 1, (1, 16, 9, 9), 16), ms)
    assert table.ms == [[3.0, 3.0], [4.0, 4.0]] and table.odd == (1.0, 1.0)
    busy = Clock(lambda count: 1e-3 if count % 4 else 1.0)  # every second pass is disturbed
    (found,) = time_layers({"a": layer}, "torch", 1, 1, busy).values()
    assert all(value == pytest.approx(1.0) for row in found.ms for value in row)


def test_widths_between_the_blocks_get_a_factor():
    layer = Layer("conv", CONV, 1, (1, 64, 9, 9), 64)
    axis = [16, 32, 64]
    ms = {(i, o): float(i * o) for i, o in itertools.product(axis, axis)}
    assert list(layer_timing._points(layer)) == [*ms, (40, 64), (64, 40)]
    ms |= {(40, 64): 40 * 64 * 1.5, (64, 40): 40 * 64 * 0.9}
    table = layer_timing._table(layer, ms)
    assert table.odd == pytest.approx((1.5, 1.0))
    assert table(40, 64) == pytest.approx(40 * 64 * 1.5) and table(48, 64) == pytest.approx(48 * 64)


def test_a_slow_table_is_measured_once():
    slow = Clock(lambda count: 10.0)
    time_layers({"a": LAYERS["norm"]}, "torch", 1, 1, slow)
    once = slow.looks
    quick = Clock()
    time_layers({"a": LAYERS["norm"]}, "torch", 1, 1, quick)
    assert quick.looks > once
