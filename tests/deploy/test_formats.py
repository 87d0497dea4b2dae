"""What holds for every format: the same function from a fresh process, the same bytes again, no word of the machine."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import network, trained

import slimming
from conftest import ROOT
from slimming import models
from slimming.deploy import FORMATS, format_named
from slimming.deploy.engines import open_engine
from slimming.deploy.fresh import fresh_process
from slimming.deploy.proving import prove
from slimming.errors import ConfigError, ExportError
from slimming.records import Record

IMAGE = (3, 8, 8)
SPEC = models.spec("preresnet", {"depth": 11, "num_classes": 3, "in_channels": 3})


def thin():
    """A network of ours that selects, with what rebuilds it."""
    torch.manual_seed(0)
    model = trained(models.build(SPEC["name"], **SPEC["arguments"]))
    plan = slimming.trace(model, torch.zeros(1, *IMAGE)).plan(slimming.GlobalRatio(0.5))
    made = network(slimming.prune(model, plan).eval(), IMAGE)
    made.record = Record(SPEC, [plan.to_dict()])
    return made


WRITE = """
import sys; sys.path[:0] = [sys.argv[1], sys.argv[2]]
from pathlib import Path
from slimming.deploy import format_named
from test_formats import thin
made = thin()
for name in sys.argv[4:]:
    module = format_named(name)
    module.write(made, Path(sys.argv[3], "model" + module.SUFFIXES[0]))
"""


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """Two folders in which two processes have written the same network in all formats."""
    folders = [tmp_path_factory.mktemp(name) for name in ("once", "again")]
    for folder in folders:
        arguments = [str(ROOT / "tests"), str(Path(__file__).parent), str(folder), *FORMATS]
        subprocess.run([sys.executable, "-c", WRITE, *arguments], check=True, cwd=folder)
    return folders


@pytest.mark.parametrize("name", FORMATS)
def test_a_fresh_process_computes_the_same(name, twice):
    path = twice[0] / f"model{format_named(name).SUFFIXES[0]}"
    model = thin().model
    with fresh_process(path) as artefact:
        proof = prove(artefact, model, [(torch.randn(n, *IMAGE), None) for n in (1, 5)])
    assert proof.images == 6 and proof.relative < 1e-5


@pytest.mark.parametrize("name", FORMATS)
def test_two_processes_write_the_same_bytes(name, twice):
    for suffix in format_named(name).SUFFIXES:
        digests = [hashlib.sha256((folder / f"model{suffix}").read_bytes()).hexdigest() for folder in twice]
        assert digests[0] == digests[1]


@pytest.mark.parametrize("name", FORMATS)
def test_no_file_tells_of_the_machine(name, twice):
    told = [str(ROOT), str(Path.home()), sys.prefix, str(twice[0]), str(twice[0].parent), ".py", "site-packages"]
    told += [os.path.dirname(torch.__file__), "stack_trace", "Traceback", "preresnet.py"]
    for suffix in format_named(name).SUFFIXES:
        content = (twice[0] / f"model{suffix}").read_bytes()
        assert [word for word in told if len(word) > 1 and word.encode() in content] == []


def test_an_unknown_format_is_refused():
    with pytest.raises(ConfigError, match="format must be one of onnx, torch, openvino, safetensors; got 'tflite'"):
        format_named("tflite")


def test_a_file_that_is_no_artefact_is_refused(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(ExportError, match="a fresh process cannot run it"), fresh_process(path) as artefact:
        artefact(torch.zeros(1, *IMAGE).numpy())


def test_an_artefact_that_computes_something_else_is_seen(twice):
    other = trained(models.build(SPEC["name"], **SPEC["arguments"]))
    proof = prove(open_engine(twice[0] / "model.onnx", "onnxruntime"), other, [(torch.randn(2, *IMAGE), None)])
    assert proof.relative > 1e-2


def test_safetensors_of_a_network_that_no_record_rebuilds_is_refused(tmp_path):
    with pytest.raises(ExportError, match="class of your own"):
        format_named("safetensors").write(network(thin().model, IMAGE), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
