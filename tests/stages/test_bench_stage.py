"""bench.py: files of several kinds timed side by side, and what cannot be timed said in one line."""

import json
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, compose_config
from slimming import checkpoint, models, stages
from slimming.config import lists_for_commas
from slimming.config.checks import ENGINES
from slimming.deploy import engines
from slimming.errors import ConfigError
from slimming.report import latencies

sys.path.insert(0, str(ROOT / "tests" / "deploy"))
from small_networks import onnx_bytes, small_vgg, written

SPEC = {"name": "vgg", "arguments": {"depth": 11, "widths": [8, "M", 12], "num_classes": 5, "in_channels": 3}}


def save(path, spec=SPEC, size=8):
    """Write a checkpoint of a fresh network that knows its data."""
    model = models.build(spec["name"], **spec["arguments"])
    channels, classes = spec["arguments"]["in_channels"], spec["arguments"]["num_classes"]
    data = {"num_classes": classes, "in_channels": channels, "image_size": size, "mean": [0.5], "std": [0.5]}
    record = {"format": 1, "model": spec, "plans": [], "metrics": {}, "data": data}
    state = {f"{checkpoint.PREFIX}{k}": v for k, v in model.state_dict().items()}
    torch.save({"state_dict": state, "slimming": record}, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return written(small_vgg(), folder) | {".ckpt": save(folder / "small.ckpt")}


def run(tmp_path, paths, *overrides):
    listed = ",".join(map(str, paths))
    stages.bench(compose_config(f"models=[{listed}]", "turns=3", *overrides, name="bench"), tmp_path)
    return json.loads((tmp_path / "bench.json").read_text())


def test_files_of_every_kind_are_timed_side_by_side(files, tmp_path, capsys):
    found = run(tmp_path, files.values(), "batch=[1,4]")
    kinds = {".onnx": "onnxruntime", ".pt2": "torch", ".xml": "openvino", ".ckpt": "torch"}
    expected = [(str(path), kinds[suffix], batch) for batch in (1, 4) for suffix, path in files.items()]
    assert [(row["model"], row["engine"], row["batch"]) for row in found["rows"]] == expected
    for row in found["rows"]:
        low, high = row["quartiles_ms"]
        assert 0 < low <= row["median_ms"] <= high
        assert len(row["turns_ms"]) == 3
        assert row["images_per_s"] == pytest.approx(1000 * row["batch"] / row["median_ms"])
    assert found["machine"]["cores"] == engines.cores()
    assert set(found["machine"]["engines"]) == set(ENGINES)
    assert found["files"][str(files[".onnx"])]["bytes"] == files[".onnx"].stat().st_size
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert latencies.read(tmp_path / "bench.json") == found
    out = capsys.readouterr().out
    assert "times as fast as the first" in out
    assert all(str(path) in out for path in files.values())


def test_a_file_is_timed_in_the_engines_asked_for(files, tmp_path):
    found = run(tmp_path, [files[".onnx"], files[".ckpt"]], "engines=[torch,openvino,onnxruntime]")
    assert [row["engine"] for row in found["rows"]] == ["onnxruntime", "openvino", "torch"]


def test_the_engines_of_the_configuration_are_those_there_are():
    assert ENGINES == engines.ENGINES


@pytest.mark.parametrize(
    ("names", "overrides", "message"),
    [
        (["missing.onnx"], (), "there is no file .*missing.onnx"),
        (["a.bin"], (), "a.bin is of no kind that can be timed: .ckpt, .pt2, .safetensors, .onnx, .xml"),
        (
            [".onnx"],
            ("engines=[torch]",),
            r"is read by onnxruntime and openvino, none of which is in engines=\['torch'\]",
        ),
        ([".onnx"], ("threads=[1,999]",), "threads=999 is more than the .* core"),
    ],
)
def test_what_cannot_be_timed_is_said(files, tmp_path, names, overrides, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, [files.get(name, tmp_path / name) for name in names], *overrides)
    assert not (tmp_path / "bench.json").exists()


def test_inputs_that_differ_are_named(files, tmp_path):
    grey = SPEC | {"arguments": SPEC["arguments"] | {"in_channels": 1}}
    with pytest.raises(
        ConfigError, match=r"inputs differ: .*onnx takes 3x8x8, .*grey.ckpt takes 1x16x16; time them apart"
    ):
        run(tmp_path, [files[".onnx"], save(tmp_path / "grey.ckpt", grey, 16)])


def test_a_fixed_batch_is_named(tmp_path):
    (tmp_path / "fixed.onnx").write_bytes(onnx_bytes(small_vgg(), batch=3))
    with pytest.raises(ConfigError, match=r"fixed.onnx takes batches of 3 alone, not batch=1"):
        run(tmp_path, [tmp_path / "fixed.onnx"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "models=.* is needed"),
        (("models=[a.onnx,a.onnx]",), "names a file twice"),
        (("models=[a.onnx]", "batch=0"), "batch must be a whole number >= 1"),
        (("models=[a.onnx]", "batch=[1,1]"), "must be one number, or several different ones"),
        (("models=[a.onnx]", "threads=[]"), "must be one number, or several different ones"),
        (("models=[a.onnx]", "engines=[fast]"), "each of engines must be one of torch, compile"),
        (("models=[a.onnx]", "engines=[]"), "engines=.. is empty"),
    ],
)
def test_values_that_mean_nothing_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose_config(*overrides, name="bench")


def test_one_number_does_as_well():
    config = compose_config("models=[a.onnx]", "batch=8", name="bench")
    assert (config.batch, config.threads) == ([8], [1])


def test_commas_are_lists_without_a_sweep():
    keys = ("models", "batch", "engines")
    given = ["models=[a,b]", "batch=1,64", "engines=torch", "turns=3,4", "--help"]
    told = ["models=[a,b]", "batch=[1,64]", "engines=[torch]", "turns=3,4", "--help"]
    assert lists_for_commas(given, keys) == lists_for_commas(told, keys) == told
    assert lists_for_commas(["engines=null", "models="], keys) == ["engines=null", "models="]
    assert lists_for_commas(["-m", "batch=1,64"], keys) == ["-m", "batch=1,64"]


def test_the_command_runs_as_typed(files, tmp_path):
    command = [sys.executable, "bench.py", f"models=[{files['.onnx']},{files['.ckpt']}]", "batch=1,3", "threads=1"]
    done = subprocess.run(
        [*command, "turns=3", f"hydra.run.dir={tmp_path}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [row["batch"] for row in json.loads((tmp_path / "bench.json").read_text())["rows"]] == [1, 1, 3, 3]
