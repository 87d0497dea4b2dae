"""export.py of pruned networks: the shape that is chosen, what is recorded of it, and low_rank."""

import json

import onnx
import pytest
import torch

import slimming
from conftest import SMALL, compose_config
from slimming import checkpoint, models, stages
from slimming.channels.embedding import selecting
from slimming.deploy import safetensors_format
from slimming.deploy.shaping import DENSE, Shape
from slimming.errors import CheckpointError, ConfigError
from slimming.records import Record
from slimming.stages import shaping

DATA = {"num_classes": 5, "in_channels": 3, "image_size": 16, "mean": [0.5] * 3, "std": [0.25] * 3}
RANDOM = "test_images=0"
WIDE = Shape(8, "full")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """The checkpoint of a pruned network that selects."""
    torch.manual_seed(0)
    arguments = {"depth": 11, "num_classes": 5, "in_channels": 3}
    model = models.build("preresnet", **arguments)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight)
    plan = slimming.trace(model, torch.zeros(1, 3, 16, 16)).plan(slimming.GlobalRatio(0.6))
    path = tmp_path_factory.mktemp("pruned") / "pruned.ckpt"
    record = Record({"name": "preresnet", "arguments": arguments}, [plan.to_dict()], config={}, data=DATA)
    checkpoint.write_network(slimming.prune(model, plan), record, path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    stages.train(compose_config(*SMALL, "trainer.max_epochs=3"), out)
    return out / "last.ckpt"


def export(path, out, *overrides):
    stages.export(compose_config(f"checkpoint={path}", *overrides, name="export"), out)
    return json.loads((out / "export.json").read_text())


def left(out):
    return {path.name for path in out.iterdir() if path.is_file()}


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    """Try two shapes: each takes a whole export."""
    monkeypatch.setattr(
        shaping, "shapes_of", lambda model: [Shape(), WIDE] if selecting(model) else [Shape(), Shape(8)]
    )


@pytest.fixture
def timings(monkeypatch):
    """What the timing says: by default that the widest network is the fastest. Returns the table, and what was asked."""
    told, asked = {WIDE: 1.0, Shape(8): 1.0, DENSE: 3.0}, {}

    def time_in_turns(runs, budget_s):
        for key, run in runs.items():
            asked[key] = run().shape
        return {key: type("Timing", (), {"median_ms": told.get(key, 5.0)}) for key in runs}

    monkeypatch.setattr(shaping, "time_in_turns", time_in_turns)
    return told, asked


def test_the_fastest_shape_is_exported_proven_and_recorded(pruned, tmp_path, timings, capsys):
    facts = export(pruned, tmp_path, RANDOM, "latency_batch=3")
    found, out = facts["shaping"], capsys.readouterr().out
    assert found["shape"] == {"block": 8, "selections": "full"}
    assert (found["engine"], found["batch"], found["threads"], found["beats_dense"]) == ("onnxruntime", 3, 1, True)
    assert timings[1].keys() == {DENSE, Shape(), WIDE}
    assert set(timings[1].values()) == {(3, 5)}
    assert [row["ms"] for row in found["timed"]].count(1.0) == 1 and found["timed"][0] == {"shape": DENSE, "ms": 3.0}
    assert "block 8, full" in out and "<-" in out and "no shape" not in out
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert "Gather" not in {node.op_type for node in graph.node}
    assert facts["parity"]["relative"] < 1e-5
    assert left(tmp_path) == {"model.onnx", "export.json", "result.json"}


def test_a_recorded_shape_is_replayed_to_the_byte_without_timing(pruned, tmp_path, timings, monkeypatch, capsys):
    timings[0][DENSE] = 0.5
    first = export(pruned, tmp_path / "a", RANDOM)
    assert first["shaping"]["beats_dense"] is False
    assert "no shape of the pruned network is faster than the dense network" in capsys.readouterr().out
    monkeypatch.setattr(shaping, "time_in_turns", None)
    again = export(pruned, tmp_path / "b", RANDOM, f"shape_from={tmp_path / 'a' / 'export.json'}")
    assert again["files"] == first["files"]
    assert again["shaping"]["shape"] == first["shaping"]["shape"] and "timed" not in again["shaping"]
    assert shaping._recorded(tmp_path / "b" / "export.json") == WIDE


def test_openvino_is_timed_in_openvino(pruned, tmp_path, timings):
    assert export(pruned, tmp_path, RANDOM, "format=openvino")["shaping"]["engine"] == "openvino"
    assert left(tmp_path) == {"model.xml", "model.bin", "export.json", "result.json"}


def test_shapes_are_really_timed(pruned, tmp_path):
    found = export(pruned, tmp_path, RANDOM)["shaping"]
    times = {row["shape"] if row["shape"] == DENSE else row["shape"]["block"]: row["ms"] for row in found["timed"]}
    assert times.keys() == {DENSE, 1, 8} and all(ms > 0 for ms in times.values())
    assert times[found["shape"]["block"]] <= 1.02 * min(times[1], times[8])


def test_dense_networks_and_those_left_alone_are_not_timed(pruned, trained, tmp_path, timings):
    assert export(trained, tmp_path / "a")["shaping"] is None
    alone = export(pruned, tmp_path / "b", RANDOM, "shape=none")
    assert alone["shaping"] is None
    assert export(pruned, tmp_path / "c", RANDOM, "format=safetensors")["shaping"] is None
    assert not timings[1]
    again = export(pruned, tmp_path / "d", RANDOM, f"shape_from={tmp_path / 'b' / 'export.json'}")
    assert again["files"] == alone["files"]


def test_too_many_threads_are_refused_before_anything_is_written(pruned, tmp_path):
    with pytest.raises(ConfigError, match="latency_threads must be"):
        export(pruned, tmp_path, RANDOM, "latency_threads=100000")


def test_int8_networks_are_timed_in_int8(trained, tmp_path, timings, monkeypatch):
    seen = []
    quantise = shaping.quantise
    monkeypatch.setattr(shaping, "quantise", lambda *args, **kwargs: seen.append(args[0]) or quantise(*args, **kwargs))
    stages.prune(compose_config(f"checkpoint={trained}", "ratio=0.5", "latency_batch=0", name="prune"), tmp_path / "p")
    facts = export(tmp_path / "p" / "pruned.ckpt", tmp_path / "q", "quantize=int8", "quantize.max_drop=null")
    assert facts["shaping"]["precision"] == "int8" and len(seen) == len(facts["shaping"]["timed"]) > 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("format=torch", "shape=auto"), "shape=auto is for format=onnx and format=openvino, not for torch"),
        (("shape_from=x", "format=safetensors"), "shape_from=x is for format=onnx and format=openvino"),
        (("shape_from=x", "shape=none"), "shape_from and shape=none exclude each other"),
        (("shape=fast",), "shape must be one of auto, none"),
        (("latency_batch=0",), "latency_batch must be"),
        (("low_rank=0",), "low_rank must be"),
    ],
)
def test_values_that_mean_nothing_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose_config("checkpoint=x", *overrides, name="export")


@pytest.mark.parametrize("content", [None, "x", "[]", "{}", '{"shaping": 3}', '{"shaping": {"shape": {"block": 0}}}'])
def test_files_that_record_no_shape_are_refused(content, pruned, tmp_path):
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises((CheckpointError, ConfigError), match=r"other\.json|shape"):
        export(pruned, tmp_path / "out", RANDOM, f"shape_from={path}")
    assert left(tmp_path / "out") == {"result.json"}


def test_layers_are_split_before_the_export(trained, tmp_path, capsys):
    facts = export(trained, tmp_path, "low_rank=0.5", "format=safetensors")
    low_rank, out = facts["low_rank"], capsys.readouterr().out
    assert low_rank["layers"] > 0 and 0.3 < low_rank["share"] <= 0.5
    assert low_rank["test/acc_split"] == facts["accuracy"]["test/acc"]
    assert low_rank["test/acc_whole"] > low_rank["test/acc_split"] - 0.05
    assert "whole ->" in out and facts["parity"]["relative"] < 1e-5
    again = safetensors_format.rebuild(tmp_path / "model.safetensors")
    assert any(name.endswith("weight") and ".0.weight" in name for name in again.state_dict())
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in slimming.load(trained).parameters())


def test_a_split_network_is_shaped_and_compared_with_the_dense_one(pruned, tmp_path, timings):
    facts = export(pruned, tmp_path, RANDOM, "low_rank=0.5")
    assert facts["shaping"]["timed"][0]["shape"] == DENSE and facts["parity"]["relative"] < 1e-5
    assert facts["low_rank"]["relative"] > 1e-4


def test_what_is_split_is_not_split_again(trained, tmp_path):
    stages.finetune(
        compose_config(f"checkpoint={trained}", "low_rank=0.5", "trainer.max_epochs=1", name="finetune"), tmp_path / "f"
    )
    split = tmp_path / "f" / "last.ckpt"
    with pytest.raises(ConfigError, match="are split already"):
        export(split, tmp_path / "a", "low_rank=0.5", "format=safetensors")
    facts = export(split, tmp_path / "b", "format=safetensors")
    assert facts["low_rank"] is None
    again, images = safetensors_format.rebuild(tmp_path / "b" / "model.safetensors"), torch.randn(2, 1, 8, 8)
    assert torch.equal(again(images), slimming.load(split)(images))


def test_the_network_of_the_test_selects(pruned):
    assert selecting(slimming.load(pruned))
