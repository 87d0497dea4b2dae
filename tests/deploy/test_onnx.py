"""ONNX files: the same function, BatchNorms folded, no word of the machine."""

import collections

import onnx
import pytest
import torch
from networks import Residual, network, pruned, trained
from torch import nn

from slimming.channels.layers import SelectBatchNorm
from slimming.deploy import format_named, onnx_format
from slimming.deploy.engines import open_engine
from slimming.deploy.proving import prove
from slimming.errors import ConfigError, ExportError

IMAGE = (3, 8, 8)


def written(model, path, image=IMAGE):
    onnx_format.write(network(model, image), path)
    return onnx.load(path)


def operators(model):
    return collections.Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("ties", ["dense", "together", "apart"])
def test_it_computes_the_same_for_any_number_of_images(ties, tmp_path):
    model = trained(Residual())
    if ties != "dense":
        model = pruned(model, IMAGE, ties)
    file = written(model, tmp_path / "a.onnx")
    batches = [(torch.randn(n, *IMAGE), None) for n in (1, 5)]
    assert prove(open_engine(tmp_path / "a.onnx", "onnxruntime"), model, batches).relative < 1e-5
    scattering = [m for m in model.modules() if isinstance(m, SelectBatchNorm) and m.scatter is not None]
    assert bool(scattering) == (ties == "apart")
    assert not operators(file).keys() & {"ScatterND", "ScatterElements"}  # a gather takes its place
    (batch, *rest) = file.graph.input[0].type.tensor_type.shape.dim
    assert (batch.dim_param, [d.dim_value for d in rest]) == ("batch", [3, 8, 8])
    assert [o.version for o in file.opset_import if not o.domain] == [onnx_format.OPSET]


def test_batchnorms_right_behind_a_convolution_are_folded_and_no_others(tmp_path):
    counts = operators(written(trained(Residual()), tmp_path / "a.onnx"))
    assert (counts["Conv"], counts["BatchNormalization"]) == (2, 1)


def test_it_passes_the_checker_and_strict_shape_inference(tmp_path):
    file = written(pruned(trained(Residual()), IMAGE, "apart"), tmp_path / "a.onnx")
    onnx.checker.check_model(file, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(file, check_type=True, strict_mode=True, data_prop=True)
    assert {value.name for value in inferred.graph.value_info} >= {
        out for node in file.graph.node[:-1] for out in node.output
    }


class Bessel(nn.Module):
    def forward(self, x):
        return torch.special.i1(x)


def test_an_operator_that_onnx_lacks_is_named_with_its_layer(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Bessel(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ExportError, match=r"bessel_i1, which is called in 1 \(Bessel\)"):
        written(model, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


class Branching(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


class Two(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)), x.amax((2, 3))


@pytest.mark.parametrize(("model", "message"), [(Branching(), "cannot follow"), (Two(), "this one has 2")])
def test_networks_that_are_no_graph_of_one_output_are_refused(model, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        written(model, tmp_path / "a.onnx")


def test_a_network_too_large_for_one_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_format, "LARGEST", 1000)
    with pytest.raises(ExportError, match="at most 2 GB: take format=torch"):
        written(trained(Residual(width=20)), tmp_path / "a.onnx")


def test_a_missing_package_is_told_with_the_extra(monkeypatch):
    monkeypatch.setattr(onnx_format, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(ConfigError, match=r'needs no_such_package, .*pip install "slimming\[export\]"'):
        format_named("onnx")
