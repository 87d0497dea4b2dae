"""Latencies in a report: tables of one machine each, and no ratio across machines."""

import copy
import json

import pytest

from conftest import compose_config
from slimming import stages
from slimming.errors import DataError
from slimming.report import latencies

MACHINE = {"cpu": "A", "flags": ["avx2"], "cores": 2, "engines": {"torch": "2", "onnxruntime": "1"}}


def row(model, median, engine="onnxruntime", batch=1, threads=1, **more):
    quartiles = [median * 0.9, median * 1.1]
    found = {"model": model, "engine": engine, "batch": batch, "threads": threads, "median_ms": median}
    return found | {"quartiles_ms": quartiles} | more


def bench(*rows, **machine):
    return {"format": 1, "machine": MACHINE | machine, "core_share": 1.0, "rows": list(rows)}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"cpu": "B"}, "cpu: A and B"),
        ({"flags": []}, r"flags: \['avx2'\] and \[\]"),
        ({"cores": 4}, "cores: 2 and 4"),
        ({"engines": {"torch": "2", "onnxruntime": "3"}}, "onnxruntime: 1 and 3"),
    ],
)
def test_latencies_of_different_machines_make_no_ratio(change, told):
    with pytest.raises(
        DataError, match=f"latencies of a and b cannot be put into a ratio.*{told}.*time both with bench.py"
    ):
        latencies.times_as_fast(row("a", 1.0), row("b", 2.0), MACHINE, MACHINE | change)


def test_another_version_of_an_engine_that_neither_used_does_not_matter():
    other = MACHINE | {"engines": {"torch": "9", "onnxruntime": "1"}}
    assert latencies.times_as_fast(row("a", 1.0), row("b", 2.0), MACHINE, other) == 2


@pytest.mark.parametrize("key", ["batch", "threads"])
def test_other_batches_or_threads_make_no_ratio(key):
    with pytest.raises(DataError, match=f"{key}: 1 and 2"):
        latencies.times_as_fast(row("a", 1.0), row("b", 2.0, **{key: 2}), MACHINE, MACHINE)


def test_the_ratio_is_taken_turn_by_turn():
    a, b = row("a", 1.0, turns_ms=[1.0, 1.0, 10.0, 1.0]), row("b", 2.0, turns_ms=[2.0, 2.0, 30.0, 2.0])
    assert latencies.times_as_fast(a, b, MACHINE, MACHINE) == 2


def test_the_table_compares_with_the_first_of_the_same_batch_and_threads():
    made = latencies.table(bench(row("a", 2.0), row("b", 1.0), row("a", 80.0, batch=64), row("b", 20.0, batch=64)))
    assert [line[-1] for line in made.rows] == ["1.00", "2.00", "1.00", "4.00"]
    assert [line[-2] for line in made.rows] == ["500", "1,000", "800", "3,200"]


def test_a_busy_machine_is_told():
    busy = bench(row("a", 1.0)) | {"core_share": 0.5}
    assert "a thread got 50% of its core" in latencies.note(busy)
    assert "Other processes" not in latencies.note(bench(row("a", 1.0)))


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b.update(format=2),
        lambda b: b.pop("machine"),
        lambda b: b["machine"].pop("flags"),
        lambda b: b["rows"].clear(),
        lambda b: b["rows"][0].update(median_ms="fast"),
        lambda b: b["rows"][0].update(median_ms=0.0),
        lambda b: b["rows"][0].update(quartiles_ms=[1.0]),
    ],
)
def test_damaged_files_are_skipped_and_told(tmp_path, damage, capsys):
    for name in ("good", "bad"):
        content = copy.deepcopy(bench(row("a", 1.0), row("b", 2.0, engine="torch")))
        if name == "bad":
            damage(content)
        (tmp_path / name).mkdir()
        (tmp_path / name / "bench.json").write_text(json.dumps(content))
    stages.report(compose_config(f"runs={tmp_path}", name="report"))
    assert "skipped bad/bench.json" in capsys.readouterr().out
    text = (tmp_path / "report.md").read_text()
    assert "latencies in engines" in text
    assert "![latencies in engines](figures/latencies_0.png)" in text
    assert text.count("| a | onnxruntime | 1 | 1 |") == 1
