"""budget.latency as it is typed. But for the last test the clock is the number of MACs, so that every time is known."""

import functools
import json
import os

import pytest
import torch

import slimming
from conftest import compose_config
from slimming import checkpoint, models, stages
from slimming.channels import latency
from slimming.channels.knapsack import LayerTimes
from slimming.deploy import sharing
from slimming.deploy.sharing import Pair
from slimming.errors import ConfigError, GraphError, LatencyError
from slimming.records import Record, config_differences
from slimming.report import collect, tables, words
from slimming.report.outcomes import outcomes
from slimming.stages import latency_budget

EXAMPLE = torch.zeros(1, 3, 8, 8)
NO_DATA = ("test=false", "calibrate.batches=0", "trainer.accelerator=cpu", "latency_batch=2")


@pytest.fixture
def dense(tmp_path):
    """The checkpoint of an untrained network: 32 ... 64 channels, their scales spread."""
    torch.manual_seed(0)
    spec = {"name": "vgg", "arguments": {"depth": 11, "widths": [32, "M", 48, 64], "num_classes": 5, "in_channels": 3}}
    model = models.build("vgg", **spec["arguments"]).eval()
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.uniform_(norm.weight)
    data = {"num_classes": 5, "in_channels": 3, "image_size": 8, "mean": [0.5] * 3, "std": [0.25] * 3}
    (tmp_path / "dense").mkdir()
    checkpoint.write_network(model, Record(spec, config={}, data=data), tmp_path / "dense" / "last.ckpt")
    return tmp_path / "dense" / "last.ckpt"


def by_macs(dense, thin, setting, turns):
    """Be a fresh process in which the time is 0.1 and 0.9 of the MACs."""
    a, b = (slimming.cost(slimming.load(path), EXAMPLE).macs for path in (dense, thin))
    return Pair(0.1 + 0.9 * b / a, 10.0, 1.0 + 9.0 * b / a)


def tables_by_macs(layers, engine, batch, threads):
    return {
        name: LayerTimes([1, 99], [1, 99], [[i * o * layer.image[-1] ** 2 for o in (1, 99)] for i in (1, 99)])
        for name, layer in layers.items()
        if layer.kind == "conv"
    }


def use(monkeypatch, timer):
    for name in ("glanced_share", "measured_share"):
        monkeypatch.setattr(latency_budget, name, functools.partial(getattr(sharing, name), timer=timer))


@pytest.fixture
def known(monkeypatch):
    """Times that are known; returns the list of the tables that were measured."""
    measured = []

    def time_layers(*arguments):
        measured.append(arguments)
        return tables_by_macs(*arguments)

    monkeypatch.setattr(latency_budget, "time_layers", time_layers)
    use(monkeypatch, by_macs)
    return measured


def prune(path, out, *overrides, share=0.5, runtime="torch"):
    given = (f"checkpoint={path}", f"budget.latency={share}", f"runtime={runtime}", *NO_DATA, *overrides)
    return stages.prune(compose_config(*given, name="prune"), out)


def result(out):
    return json.loads((out / "result.json").read_text())


def table_of(dense):
    return dense.with_name("last.ckpt.latency-torch-2x1.json")


@pytest.mark.parametrize("share", [0.7, 0.5])
def test_what_is_asked_is_delivered_and_told(share, dense, known, tmp_path, capsys):
    prune(dense, tmp_path / "a", share=share)
    r = result(tmp_path / "a")
    told = r["latency"]
    assert told["delivered"] == pytest.approx(share, rel=0.08) and told["asked"] == share
    keys = ("engine", "batch", "threads", "processes", "passes", "spread")
    assert [told[key] for key in keys] == ["torch", 2, 1, 5, 50, 0.0]
    assert told["delivered"] == pytest.approx(0.1 + 0.9 * r["cost"]["macs"] / r["cost_before"]["macs"])
    assert all(width % 8 == 0 for width in r["widths"] if width != "M")
    assert r["criterion"] == {"criterion": "Latency", "latency": share, "runtime": "torch", "batch": 2, "threads": 1}
    text = capsys.readouterr().out
    assert f"latency: {share:.1%} of the dense network's asked, {told['delivered']:.1%} delivered" in text
    assert f"in torch {told['version']}, batch 2, 1 thread" in text


def test_another_budget_takes_the_table_that_is_there(dense, known, tmp_path):
    prune(dense, tmp_path / "a")
    before = table_of(dense).read_bytes()
    prune(dense, tmp_path / "b", share=0.7)
    assert len(known) == 1 and table_of(dense).read_bytes() == before
    prune(dense, tmp_path / "c", "latency_batch=3")
    assert len(known) == 2, "another batch has a table of its own"
    assert result(tmp_path / "a")["latency"]["table"] == table_of(dense).name


CHANGES = {
    "another CPU": (
        {"machine": {"cpu": "abacus"}},
        r"another machine or engine, here and there: cpu: .* and abacus; delete",
    ),
    "other cores": ({"machine": {"cores": 99}}, r"cores: \d+ and 99; delete it, and the table is measured anew here"),
    "another torch": ({"machine": {"engines": {"torch": "0.4"}}}, r"torch: .* and 0\.4; delete it"),
    "another network": ({"network": "0" * 32}, r"is of another network, engine or setting: delete it"),
    "another engine": ({"engine": "openvino"}, r"is of another network, engine or setting: delete it"),
    "of the future": ({"format": 2}, r"no table of latencies .*format 2, this version reads 1.*: delete it"),
    "no times": ({"times": {"layers": {"a": 0}, "tables": []}}, r"no table of latencies \(IndexError"),
    "no machine": ({"machine": None}, r"no table of latencies \(TypeError"),
}


@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES.keys())
def test_tables_of_something_else_are_refused(change, words, dense, known, tmp_path):
    prune(dense, tmp_path / "a")
    found = json.loads(table_of(dense).read_text())
    for key, value in change.items():
        found[key] = found[key] | value if key == "machine" and value else value
    table_of(dense).write_text(json.dumps(found))
    with pytest.raises(LatencyError, match=words):
        prune(dense, tmp_path / "b")
    assert os.listdir(tmp_path / "b") == ["result.json"] and len(known) == 1
    table_of(dense).unlink()
    prune(dense, tmp_path / "c")


def test_what_cannot_be_reached_leaves_nothing(dense, known, tmp_path):
    with pytest.raises(
        GraphError, match=r"budget.latency=0.05 cannot be reached: .* 0\.\d+ of the dense latency remain"
    ):
        prune(dense, tmp_path / "a", share=0.05)
    assert os.listdir(tmp_path / "a") == ["result.json"] and "cannot be reached" in result(tmp_path / "a")["error"]


def test_finer_widths_reach_further(dense, known, tmp_path):
    prune(dense, tmp_path / "a", "round_to=2", share=0.15)
    assert all(width % 2 == 0 for width in result(tmp_path / "a")["widths"] if width != "M")


def test_a_noisy_machine_is_named_with_its_spread(dense, known, tmp_path, monkeypatch):
    count = iter(range(1000))

    def noisy(*arguments):
        pair, factor = by_macs(*arguments), 1 + 0.1 * (next(count) % 3 - 1)
        return Pair(pair.share * factor, pair.dense_ms, pair.thin_ms * factor)

    use(monkeypatch, noisy)
    with pytest.raises(LatencyError, match=r"too noisy .*interquartile range over 5 processes is \d+\.\d%"):
        prune(dense, tmp_path / "a")
    assert os.listdir(tmp_path / "a") == ["result.json"] and table_of(dense).exists()


def test_a_runtime_that_is_not_installed(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(latency_budget.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"runtime=onnx needs onnx and .*pip install 'slimming\[export\]'"):
        prune(dense, tmp_path / "a", runtime="onnx")


def test_eager_torch_times_models_of_this_package():
    cfg = compose_config(
        "budget.latency=0.5", "runtime=torch", "model._target_=torchvision.models.resnet18", name="slim"
    )
    with pytest.raises(ConfigError, match=r"runtime=torch times .*take runtime=onnx .*for torchvision.models.resnet18"):
        latency_budget.check(cfg)


def test_more_threads_than_cores(dense, tmp_path):
    with pytest.raises(ConfigError, match=r"latency_threads must be a whole number >= 1 and <= \d+, got 4096"):
        prune(dense, tmp_path / "a", "latency_threads=4096")


def test_a_folder_that_cannot_be_written(dense, known, tmp_path, monkeypatch):
    def refuse(path, text):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(latency_budget, "write_text", refuse)
    with pytest.raises(LatencyError, match=r"beside the checkpoint, .* cannot be written \(Permission denied\): copy"):
        prune(dense, tmp_path / "a")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["budget.latency=0.5"], r"budget.latency=0.5 needs runtime=onnx"),
        (["budget.latency=1", "runtime=onnx"], r"budget.latency must be a number > 0 and < 1, got 1"),
        (["budget.latency=0", "runtime=onnx"], r"budget.latency must be"),
        (["budget.latency=0.5", "runtime=tensorrt"], r"runtime must be one of torch, onnx, openvino; got 'tensorrt'"),
        (["budget.latency=0.5", "runtime=onnx", "ratio=0.5"], r"got ratio=0.5 and budget.latency=0.5"),
        (["budget.latency=0.5", "budget.macs=0.5", "runtime=onnx"], r"got budget.macs=0.5 and budget.latency=0.5"),
        (["budget.latency=0.5", "runtime=onnx", "criterion=global"], r"got criterion=global and budget.latency=0.5"),
        (["budget.latency=0.5", "runtime=onnx", "latency_batch=0"], r"needs latency_batch >= 1"),
        (["budget.latency=0.5", "runtime=onnx", "per=macs"], r"per=macs and budget.latency exclude each other"),
        (["ratio=0.5", "runtime=onnx"], r"runtime=onnx is for budget.latency"),
        (["ratio=0.5", "latency_threads=2"], r"latency_threads=2 is for budget.latency"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stage", ["prune", "slim"])
def test_values_that_do_not_fit(stage, overrides, told):
    given = ["checkpoint=a.ckpt"] if stage == "prune" else []
    with pytest.raises(ConfigError, match=told):
        compose_config(*given, *overrides, name=stage)


def test_the_batch_matters_to_a_latency_and_to_nothing_else():
    budget = {"budget": {"latency": 0.5}, "latency_batch": 64}
    assert config_differences(budget, budget | {"latency_batch": 1}) == "latency_batch was 64, is 1"
    assert not config_differences({"ratio": 0.5, "latency_batch": 64}, {"ratio": 0.5, "latency_batch": 1})


def test_reports_show_what_was_delivered(dense, known, tmp_path):
    prune(dense, tmp_path / "runs" / "a")
    (run,) = collect.collect(tmp_path / "runs").runs
    share = run.result["latency"]["delivered"]
    assert words.delivered([run]) == f"torch: 50.0% asked, {share:.1%} delivered"
    table = tables.stages(outcomes([run]))
    assert any(f"{share:.1%} delivered" in str(cell) for row in table.rows for cell in row)
    assert "latency 0.5 in torch" in words.setting(run)


def test_a_real_engine_is_timed(dense, tmp_path, monkeypatch):
    """A smoke test on a machine that may be busy: what comes out is about what was asked."""
    monkeypatch.setattr(sharing, "LARGEST_SPREAD", 10.0)
    monkeypatch.setattr(latency, "ACCEPTED", 0.5)
    monkeypatch.setattr(sharing, "PROCESSES", 2)
    monkeypatch.setattr(sharing, "GLANCE", (1, 5))
    prune(dense, tmp_path / "a", "latency_batch=32", share=0.6, runtime="onnx")
    told = result(tmp_path / "a")["latency"]
    assert told["engine"] == "onnxruntime" and told["dense_ms"] > told["ms"] > 0
    assert 0.3 < told["delivered"] < 0.9
    assert dense.with_name("last.ckpt.latency-onnx-32x1.json").exists()


def test_a_detector_is_timed_by_what_is_exported(known, tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    use(monkeypatch, lambda a, b, *_: Pair(share := b.stat().st_size / a.stat().st_size, 10.0, 10.0 * share))
    arguments = {"width": 0.25, "num_classes": 2, "in_channels": 3, "image_size": 64}
    model = models.build("yolov3_tiny", **arguments)
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.uniform_(norm.weight)
    data = {"num_classes": 2, "in_channels": 3, "image_size": 64, "mean": [0.5] * 3, "std": [0.25] * 3}
    record = Record({"name": "yolov3_tiny", "arguments": arguments}, config={"task": "detection"}, data=data)
    checkpoint.write_network(model, record, tmp_path / "last.ckpt")
    prune(tmp_path / "last.ckpt", tmp_path / "a", runtime="onnx")
    assert result(tmp_path / "a")["latency"]["delivered"] == pytest.approx(0.5, rel=0.08)
