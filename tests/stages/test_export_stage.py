"""The export stage from a checkpoint to files, and everything that may go wrong on the way."""

import hashlib
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import slimming
from conftest import ROOT, SMALL, compose_config
from slimming import stages
from slimming.data import Digits
from slimming.deploy import safetensors_format
from slimming.deploy.engines import open_engine
from slimming.errors import CheckpointError, ConfigError, DataError, ExportError, RunDirectoryError
from slimming.report.collect import collect
from slimming.stages import exporting

PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
QUICK = "format=safetensors"  # captures nothing


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint, and its test accuracy."""
    out = tmp_path_factory.mktemp("trained")
    return out / "last.ckpt", stages.train(compose_config(*SMALL, "trainer.max_epochs=3"), out)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported")
    return out, export(trained[0], out)


def export(path, out, *overrides):
    return stages.export(compose_config(f"checkpoint={path}", *overrides, name="export"), out)


def read(out, name="export.json"):
    return json.loads((out / name).read_text())


def test_an_export_leaves_what_its_user_must_know(trained, exported):
    out, accuracy = exported
    assert set(os.listdir(out)) == {"model.onnx", "export.json", "result.json"}
    facts, result = read(out), read(out, "result.json")
    content = (out / "model.onnx").read_bytes()
    assert facts["files"] == {"model.onnx": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    assert facts["size_bytes"] == len(content)
    assert facts["input"] == {
        "name": "images",
        "shape": ["batch", 1, 8, 8],
        "type": "float32",
        "pixel_range": [0, 1],
        "mean": list(Digits.mean),
        "std": list(Digits.std),
    }
    assert facts["output"] == {"name": "logits", "shape": ["batch", 10], "classes": None}
    assert facts["parity"]["images"] == facts["accuracy"]["n_test"] == 359
    assert facts["parity"]["of"] == "the test images" and facts["parity"]["relative"] < 1e-5
    assert (
        accuracy == facts["accuracy"]["test/acc"] == facts["accuracy"]["test/acc_before"] == pytest.approx(trained[1])
    )
    assert (facts["format"], facts["opset"], facts["shaping"], facts["model"]) == ("onnx", 18, None, "vgg11")
    assert facts["versions"].keys() >= {"slimming", "torch", "onnx", "onnxruntime", "machine"}
    assert (result["status"], result["stage"], result["export"]) == ("finished", "export", facts)
    assert os.path.samefile(out / result["parent"], trained[0])


def test_the_lines_of_the_page_classify_an_image_without_torch(exported, tmp_path):
    data = Digits(image_size=8)
    data.setup()
    image = data.splits["test"].images[7]
    Image.fromarray(image[0].numpy()).save(tmp_path / "image.png")
    for name in ("model.onnx", "export.json"):
        os.symlink(exported[0] / name, tmp_path / name)
    lines = PYTHON.findall((ROOT / "docs" / "deployment.md").read_text())[0]
    assert "torch" not in lines and "slimming" not in lines
    code = "import sys; sys.modules.update(torch=None, slimming=None)\n" + lines
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    run = open_engine(exported[0] / "model.onnx", "onnxruntime")
    assert int(done.stdout) == run(data.transform(image[None]).numpy())[0].argmax()


def test_the_lines_of_the_page_rebuild_a_network(trained, tmp_path, monkeypatch):
    pruned = tmp_path / "pruned"
    stages.prune(compose_config(f"checkpoint={trained[0]}", "ratio=0.5", "latency_batch=0", name="prune"), pruned)
    export(pruned / "pruned.ckpt", tmp_path, QUICK)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(PYTHON.findall((ROOT / "docs" / "deployment.md").read_text())[1], names)
    thin, images = slimming.load(pruned / "pruned.ckpt"), torch.randn(2, 1, 8, 8)
    assert torch.equal(names["model"](images), thin(images))
    assert names["weights"].keys() == thin.state_dict().keys()
    assert str(tmp_path).encode() not in (tmp_path / "model.safetensors").read_bytes()


def test_what_is_there_is_replaced_only_on_demand_and_only_by_what_passes(trained, tmp_path, monkeypatch):
    export(trained[0], tmp_path, QUICK)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    with pytest.raises(RunDirectoryError, match=r"holds model\.safetensors already: give overwrite=true"):
        export(trained[0], tmp_path, QUICK)
    with pytest.raises(RunDirectoryError, match=r"holds export\.json already"):
        export(trained[0], tmp_path, "format=torch")
    with monkeypatch.context() as patch, pytest.raises(ExportError, match="does not compute"):
        patch.setattr(safetensors_format, "write", _spoilt)
        export(trained[0], tmp_path, QUICK, "overwrite=true")
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before
    export(trained[0], tmp_path, QUICK, "overwrite=true", "test_images=0")
    assert set(os.listdir(tmp_path)) == before.keys()
    assert read(tmp_path)["accuracy"] is None


def _spoilt(network, path, write=safetensors_format.write):
    """Write a network whose head was changed."""
    model = type(network)(slimming.channels.copying.copy_model(network.model), network.image, network.record)
    with torch.no_grad():
        [*model.model.parameters()][-1].add_(1)
    write(model, path)


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(("stop", "seen"), [(KeyboardInterrupt(), KeyboardInterrupt), (FULL, ExportError)])
def test_nothing_half_written_is_left(stop, seen, trained, tmp_path, monkeypatch):
    def write(network, path):
        path.write_bytes(b"half")
        raise stop

    monkeypatch.setattr(safetensors_format, "write", write)
    with pytest.raises(seen, match="No space left on device" if stop is FULL else None):
        export(trained[0], tmp_path, QUICK)
    assert os.listdir(tmp_path) == ["result.json"]
    assert read(tmp_path, "result.json")["status"] == "failed"


def test_what_a_killed_export_left_is_cleared_away(trained, tmp_path):
    left = tmp_path / f"{exporting.WORKSHOP}killed"
    left.mkdir()
    (left / "model.onnx").write_bytes(b"half")
    export(trained[0], tmp_path, QUICK)
    assert not left.exists()


def test_fewer_test_images_are_spread_over_all(trained, tmp_path):
    export(trained[0], tmp_path, QUICK, "test_images=10")
    assert read(tmp_path)["accuracy"]["n_test"] == 10
    data = Digits(image_size=8)
    data.setup()
    labels = torch.cat([labels for _, labels in exporting._loader(data, 10)])
    picked = np.linspace(0, 358, 10).round().astype(int)
    assert labels.tolist() == data.splits["test"].labels[picked].tolist()


def test_without_data_random_images_must_do(trained, tmp_path, capsys):
    nowhere = ["data=image_folder", f"data.root={tmp_path / 'nowhere'}"]
    with pytest.raises(DataError, match=r"give data\.root=<folder>, or go without by test_images=0: random images"):
        export(trained[0], tmp_path / "a", QUICK, *nowhere)
    assert np.isnan(export(trained[0], tmp_path / "b", QUICK, *nowhere, "test_images=0"))
    facts = read(tmp_path / "b")
    assert (facts["parity"]["of"], facts["parity"]["images"], facts["accuracy"]) == ("random", 32, None)
    assert "32 images (random)" in capsys.readouterr().out


def test_data_of_another_number_of_classes_are_refused(trained, tmp_path):
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "images" / part / name / "1.png")
    with pytest.raises(ConfigError, match=r"the data have 2 classes, .* was trained for 10"):
        export(
            trained[0], tmp_path, QUICK, "data=image_folder", f"data.root={tmp_path / 'images'}", "data.batch_size=2"
        )


def test_files_that_are_no_checkpoint_and_no_checkpoint_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"checkpoint=<run directory>/pruned\.ckpt is needed"):
        compose_config(name="export")
    with pytest.raises(ConfigError, match="format must be one of onnx, torch, openvino, safetensors; got 'tflite'"):
        compose_config("checkpoint=x", "format=tflite", name="export")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        export(tmp_path / "none.ckpt", tmp_path)


def test_a_report_does_not_stumble_over_exports(exported, tmp_path):
    found = collect(exported[0])
    assert (found.runs, found.failed, found.unusable) == ([], [], [])
