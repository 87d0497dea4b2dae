"""A network gives the same in every engine, and what cannot be opened is said in one line."""

import sys

import numpy as np
import pytest
import torch
from small_networks import onnx_bytes, small_vgg, written
from torch import nn

from slimming import checkpoint
from slimming.deploy import engines
from slimming.deploy.engines import cores, open_engine, torch_threads_kept
from slimming.errors import ConfigError, SlimmingError

IMAGES = np.random.default_rng(0).standard_normal((5, 3, 8, 8), dtype=np.float32)


@pytest.fixture(scope="module")
def model():
    return small_vgg()


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    return written(model, tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def expected(model):
    with torch.no_grad():
        return model(torch.from_numpy(IMAGES)).numpy()


@pytest.mark.parametrize(
    ("suffix", "name"), [(".onnx", "onnxruntime"), (".onnx", "openvino"), (".xml", "openvino"), (".pt2", "torch")]
)
def test_a_file_gives_what_the_network_gives(files, expected, suffix, name):
    engine = open_engine(files[suffix], name)
    assert engine.shape == (None, 3, 8, 8)
    for count in (5, 1):
        np.testing.assert_allclose(engine(IMAGES[:count]), expected[:count], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_the_bytes_of_an_onnx_file_do_as_well(files, expected, name):
    engine = open_engine(files[".onnx"].read_bytes(), name)
    np.testing.assert_allclose(engine(IMAGES), expected, rtol=1e-4, atol=1e-5)


def test_outputs_of_two_passes_do_not_share_memory(files):
    for suffix, name in ((".onnx", "onnxruntime"), (".xml", "openvino"), (".pt2", "torch")):
        engine = open_engine(files[suffix], name)
        first = engine(IMAGES)
        kept = first.copy()
        engine(-IMAGES)
        assert np.array_equal(first, kept), name


def test_a_checkpoint_says_its_input(model, tmp_path):
    data = {"num_classes": 5, "in_channels": 3, "image_size": 8, "mean": [0.5] * 3, "std": [0.2] * 3}
    spec = {"name": "vgg", "arguments": {"depth": 11, "widths": [8, "M", 12], "num_classes": 5, "in_channels": 3}}
    content = {"state_dict": {f"model.{k}": v for k, v in model.state_dict().items()}}
    content["slimming"] = {"format": 1, "model": spec, "plans": [], "metrics": {}, "data": data}
    torch.save(content, tmp_path / "a.ckpt")
    engine = open_engine(tmp_path / "a.ckpt", "torch")
    assert engine.shape == (None, 3, 8, 8)
    assert np.array_equal(engine(IMAGES), checkpoint.load(tmp_path / "a.ckpt")(torch.from_numpy(IMAGES)).detach())


def test_a_fixed_batch_is_seen(model):
    assert open_engine(onnx_bytes(model, batch=3), "onnxruntime").shape == (3, 3, 8, 8)


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_and_is_compiled():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.ReLU()).eval()
    engine = open_engine(model, "compile")
    with torch.no_grad():
        np.testing.assert_allclose(engine(IMAGES), model(torch.from_numpy(IMAGES)).numpy(), rtol=1e-4, atol=1e-5)
    seen = []
    hook = model.register_forward_pre_hook(lambda *_: seen.append(torch.compiler.is_compiling()))
    torch._dynamo.reset()
    engine(IMAGES)
    hook.remove()
    assert seen == [True]


def test_torch_runs_with_the_threads_of_each_engine(monkeypatch):
    monkeypatch.setattr(engines, "cores", lambda: 2)
    seen = []

    class Telling(nn.Module):
        def forward(self, x):
            seen.append(torch.get_num_threads())
            return x

    before = torch.get_num_threads()
    with torch_threads_kept():
        for threads in (1, 2, 1):
            open_engine(Telling(), "torch", threads)(IMAGES)
    assert seen == [1, 2, 1]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("file", "name", "message"),
    [
        ("missing.onnx", "onnxruntime", "there is no file .*missing.onnx"),
        ("a.txt", "torch", "cannot be run by torch, which runs .ckpt, .pt2"),
        ("a.ckpt", "openvino", "cannot be run by openvino, which runs .onnx, .xml"),
        ("a.onnx", "tensorrt", "the engine must be one of torch, compile, onnxruntime, openvino"),
    ],
)
def test_what_cannot_be_opened_is_said(tmp_path, file, name, message):
    with pytest.raises(ConfigError, match=message):
        open_engine(tmp_path / file, name)


@pytest.mark.parametrize(
    ("suffix", "name"), [(".onnx", "onnxruntime"), (".onnx", "openvino"), (".pt2", "torch"), (".ckpt", "torch")]
)
def test_a_damaged_file_is_one_clear_error(tmp_path, suffix, name):
    (tmp_path / f"bad{suffix}").write_bytes(b"no network")
    with pytest.raises(SlimmingError, match="bad"):
        open_engine(tmp_path / f"bad{suffix}", name)


def test_more_threads_than_cores_are_refused(model):
    with pytest.raises(ConfigError, match=f"threads must be a whole number >= 1 and <= {cores()}"):
        open_engine(model, "torch", cores() + 1)


def test_an_engine_that_is_not_installed_says_how_to_get_it(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ConfigError, match=r"openvino is not installed: pip install 'slimming\[openvino\]'"):
        open_engine(files[".xml"], "openvino")
