"""Int8 networks: near the float ones, layers back in float where they cost too much, the same bytes twice."""

import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from small_networks import balanced, onnx_bytes, small_vgg
from torch import nn

from slimming.channels.layers import set_indices
from slimming.deploy import quantising, quantising_onnx
from slimming.deploy.engines import open_engine
from slimming.deploy.quantising import Quantised, accuracy, quantise
from slimming.errors import ConfigError, ExportError

RANDOM = np.random.default_rng(0)
CALIBRATION = [RANDOM.standard_normal((32, 3, 8, 8), dtype=np.float32) for _ in range(2)]
IMAGES = RANDOM.standard_normal((256, 3, 8, 8), dtype=np.float32)


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """A small VGG as .onnx and .xml, by suffix."""
    return written(balanced(small_vgg(), IMAGES), tmp_path_factory.mktemp("vgg"))


def written(model: nn.Module, folder: Path) -> dict[str, Path]:
    import openvino

    paths = {suffix: folder / f"float{suffix}" for suffix in (".onnx", ".xml")}
    paths[".onnx"].write_bytes(onnx_bytes(model))
    openvino.save_model(openvino.convert_model(paths[".onnx"]), paths[".xml"], compress_to_fp16=False)
    return paths


def labelled(path: Path, engine: str = "onnxruntime") -> list:
    """Images with the labels that the float network gives them: its accuracy on them is 1."""
    return [(IMAGES, open_engine(path, engine)(IMAGES).argmax(1))]


def error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def types(path: Path) -> Counter:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize(("suffix", "engine"), [(".onnx", "onnxruntime"), (".xml", "openvino")])
def test_a_quantised_network_is_near_the_float_one_and_smaller(vgg, tmp_path, suffix, engine):
    target = tmp_path / f"int8{suffix}"
    found = quantise(vgg[suffix], target, CALIBRATION, labelled(vgg[suffix], engine), max_drop=10.0)
    before, after = (open_engine(path, engine)(IMAGES) for path in (vgg[suffix], target))
    assert 1e-4 < error(after, before) < 0.1  # not the same, but near
    assert found.accuracy_before == 1
    assert found.accuracy == accuracy(open_engine(target, engine), labelled(vgg[suffix], engine)) >= 0.9
    assert (found.floats, found.calibration_images, found.checked_images) == ([], 64, 256)


def test_every_layer_is_in_signed_int8_per_channel(vgg, tmp_path):
    quantise(vgg[".onnx"], tmp_path / "int8.onnx", CALIBRATION, max_drop=None)
    model = onnx.load(tmp_path / "int8.onnx")
    weights = {w.name: w for w in model.graph.initializer}
    made = {output: node for node in model.graph.node for output in node.output}
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(layers) == 3
    for layer in layers:
        sources = [made[name] for name in layer.input[:2]]
        assert [source.op_type for source in sources] == ["DequantizeLinear"] * 2
        weight, scales, zero = (weights[name] for name in sources[1].input)
        assert weight.data_type == onnx.TensorProto.INT8
        assert list(scales.dims) == [weight.dims[0] if layer.op_type == "Conv" else max(scales.dims)] != [1]
        assert not onnx.numpy_helper.to_array(zero).any()
        assert weights[sources[0].input[2]].data_type == onnx.TensorProto.INT8


def test_symmetric_means_zero_points_of_zero(vgg, tmp_path):
    quantise(vgg[".onnx"], tmp_path / "int8.onnx", CALIBRATION, max_drop=None, symmetric=True)
    points = [w for w in onnx.load(tmp_path / "int8.onnx").graph.initializer if w.name.endswith("zero_point")]
    assert points
    assert not any(onnx.numpy_helper.to_array(point).any() for point in points)


def test_seven_bits_where_the_cpu_lacks_vnni_and_it_is_said(vgg, tmp_path, monkeypatch):
    largest = {}
    for name, flags in (("with", ["avx2", "avx_vnni"]), ("without", ["avx2", "avx512f"])):
        monkeypatch.setattr(quantising, "cpu_flags", lambda flags=flags: flags)
        found = quantise(vgg[".onnx"], tmp_path / "int8.onnx", CALIBRATION, max_drop=None)
        weights = [
            w for w in onnx.load(tmp_path / "int8.onnx").graph.initializer if w.name.endswith("weight_quantized")
        ]
        largest[name] = max(int(np.abs(onnx.numpy_helper.to_array(w).astype(int)).max()) for w in weights)
        assert f"weights in {'8' if name == 'with' else '7'} bits" in found.scheme
    assert largest == {"with": 127, "without": 64}


def test_the_same_bytes_in_two_processes_and_no_path_in_them(vgg, tmp_path):
    code = (
        "import sys, pathlib, hashlib, numpy as np; from slimming.deploy.quantising import quantise\n"
        "source, target = map(pathlib.Path, sys.argv[1:])\n"
        "images = np.random.default_rng(1).standard_normal((16, 3, 8, 8), dtype=np.float32)\n"
        "quantise(source, target, [images], max_drop=None)"
    )
    for suffix, others in ((".onnx", ()), (".xml", (".bin",))):
        digests = set()
        for seed in ("1", "2"):
            target = tmp_path / seed / f"int8{suffix}"
            target.parent.mkdir(exist_ok=True)
            environment = os.environ | {"PYTHONHASHSEED": seed}
            subprocess.run([sys.executable, "-c", code, vgg[suffix], target], check=True, env=environment)
            content = b"".join(target.with_suffix(s).read_bytes() for s in (suffix, *others))
            digests.add(hashlib.sha256(content).hexdigest())
            for secret in (str(tmp_path), str(vgg[suffix].parent), "site-packages", "/tmp", str(Path.home())):
                assert secret.encode() not in content, (suffix, secret)
        assert len(digests) == 1, suffix


class Spoiled(nn.Module):
    """Its second convolution reads channels of very different scales, which one int8 scale cannot hold."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 8, 3, padding=1)
        self.classifier = nn.Linear(8, 5)
        with torch.no_grad():
            self.first.weight[0] *= 2000
            self.second.weight[:, 0] = 0
            self.second.weight *= 5

    def forward(self, x):
        x = self.third(self.second(self.first(x)).relu()).relu()
        return self.classifier(x.mean((2, 3)))


def test_layers_go_back_to_float_the_most_sensitive_first(tmp_path):
    source, target = written(balanced(Spoiled().eval(), IMAGES), tmp_path)[".onnx"], tmp_path / "int8.onnx"
    check = labelled(source)
    free = quantise(source, target, CALIBRATION, check, max_drop=None)
    assert free.accuracy < 0.9
    found = quantise(source, target, CALIBRATION, check, max_drop=5.0)
    assert found.accuracy >= 0.95
    assert found.accuracy == accuracy(open_engine(target, "onnxruntime"), check)
    assert 0 < len(found.floats) < found.layers == 4
    assert found.floats[0] == max(found.sensitivity, key=found.sensitivity.get)
    assert {"first", "second"} & set(found.floats)
    assert "went back to float: " + found.floats[0] in found.describe("images")


def test_a_drop_that_cannot_be_met_is_said(tmp_path):
    torch.manual_seed(0)
    source = written(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).eval(), tmp_path)[".onnx"]
    images = RANDOM.standard_normal((4096, 3, 8, 8), dtype=np.float32)
    logits = open_engine(source, "onnxruntime")(images)
    margin = np.diff(np.sort(logits, 1)[:, -2:], axis=1)[:, 0]
    hard = margin.argsort()[:16]  # on the border between two classes: a small error moves some over it
    with pytest.raises(ExportError, match=r"max_drop=0 cannot be met: with one layer left in int8, .* export in float"):
        quantise(source, tmp_path / "int8.onnx", CALIBRATION, [(images[hard], logits[hard].argmax(1))], max_drop=0.0)


class Preactivated(nn.Module):
    """A residual stream read by a BatchNorm that selects, and a concatenation of unlike scales read by another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.side = (nn.Conv2d(3, 8, 3, padding=1) for _ in range(2))
        self.norm1, self.conv1 = nn.BatchNorm2d(5, momentum=None), nn.Conv2d(5, 8, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(16, momentum=None), nn.Conv2d(16, 8, 3, padding=1)
        set_indices(self.norm1, torch.tensor([0, 2, 3, 6, 7]), None, 5)
        self.classifier = nn.Linear(8, 5)
        self.conv1.weight.data *= 200
        with torch.no_grad():
            self.train()(torch.from_numpy(IMAGES))

    def forward(self, x):
        stem = self.stem(x)
        grown = self.conv1(self.norm1(stem + self.side(x)).relu())
        x = self.conv2(self.norm2(torch.cat((grown, stem), 1)).relu())
        return self.classifier(x.relu().mean((2, 3)))


def test_what_a_batchnorm_reads_stays_float(tmp_path, monkeypatch):
    source, target = written(balanced(Preactivated().eval(), IMAGES), tmp_path)[".onnx"], tmp_path / "int8.onnx"
    assert {"BatchNormalization": 2, "Gather": 1, "Concat": 1, "Add": 1}.items() <= types(source).items()
    found = quantise(source, target, CALIBRATION, max_drop=None)
    model = onnx.load(target)
    made = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type == "Conv":
            assert made[node.input[1]].op_type == "DequantizeLinear"
        if node.op_type in ("BatchNormalization", "Add", "Concat", "Gather"):
            readers = [n.op_type for n in model.graph.node if node.output[0] in n.input]
            assert node.op_type == "BatchNormalization" or "QuantizeLinear" not in readers or "Conv" in readers
    assert found.layers == 5
    expected = open_engine(source, "onnxruntime")(IMAGES)
    streams_in_float = error(open_engine(target, "onnxruntime")(IMAGES), expected)
    monkeypatch.setattr(quantising_onnx, "_read_by_norms", lambda graph: set())
    quantise(source, target, CALIBRATION, max_drop=None)
    assert streams_in_float < 0.3 * error(open_engine(target, "onnxruntime")(IMAGES), expected)


def test_without_images_it_says_what_to_give(vgg, tmp_path):
    with pytest.raises(ConfigError, match="quantize=int8 needs training images to calibrate on: give data="):
        quantise(vgg[".onnx"], tmp_path / "int8.onnx", [], [])
    with pytest.raises(ConfigError, match=r"quantize\.max_drop needs labelled images.*quantize\.max_drop=null"):
        quantise(vgg[".onnx"], tmp_path / "int8.onnx", CALIBRATION, [], max_drop=1.0)
    with pytest.raises(ConfigError, match=r"quantize=int8 is for format=onnx and format=openvino, not for .pt2"):
        quantise(tmp_path / "a.pt2", tmp_path / "int8.pt2", CALIBRATION, max_drop=None)
    assert list(tmp_path.iterdir()) == []


def test_what_was_done_is_told():
    found = Quantised("static", 512, 17, ["a", "b"], {}, 0.8, 0.81, 2000, 1.0)
    assert found.describe("validation images") == (
        "int8: static; calibrated on 512 training images\n"
        "  accuracy on 2,000 validation images: 81.00% -> 80.00% (a drop of 1.00 points, allowed 1)\n"
        "  2 of 17 layers went back to float: a, b"
    )
