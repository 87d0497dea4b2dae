"""Which keys of a configuration matter to a result: one list, for resuming and for the report."""

import json

import pytest

from slimming.errors import CheckpointError
from slimming.records import Record, Result, config_differences, finished, what_matters, write_failure

BEFORE = {
    "seed": 1,
    "sparsity": 1e-4,
    "init_from": "a/last.ckpt",
    "data": {"root": "/a/images", "num_workers": 2, "eval_batch_size": 256, "batch_size": 64, "seed": 1},
    "trainer": {"max_epochs": 3, "enable_progress_bar": True, "profiler": None},
    "callbacks": {"stop": {"_target_": "x", "epoch": 1}},
    "finetune": {"distill": {"teacher": "a/last.ckpt", "alpha": 0.5, "temperature": 4.0}},
}


def changed(key: str, value) -> dict:
    *path, last = key.split(".")
    config = {k: changed_copy(v) for k, v in BEFORE.items()}
    node = config
    for part in path:
        node = node.setdefault(part, {})
    node[last] = value
    return config


def changed_copy(value):
    return {k: changed_copy(v) for k, v in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("resume", True),
        ("init_from", None),
        ("checkpoint", "b/pruned.ckpt"),
        ("callbacks", {}),
        ("logger.tensorboard", {"_target_": "x"}),
        ("latency_batch", 0),
        ("data.root", "/b/images"),
        ("data.cache_dir", "/tmp"),
        ("data.num_workers", 0),
        ("data.eval_batch_size", 32),
        ("trainer.enable_progress_bar", False),
        ("trainer.enable_model_summary", True),
        ("trainer.profiler", "simple"),
        ("finetune.distill.teacher", "b/last.ckpt"),
        ("finetune.distill.temperature", None),  # versions before this default wrote it in numbers
        ("trainer.gradient_clip_val", None),  # a key that was not there yet
    ],
)
def test_what_does_not_matter(key, value):
    assert config_differences(BEFORE, changed(key, value)) == "" and changed(key, value) != BEFORE


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("seed", 2, "seed was 1, is 2"),
        ("data.seed", 2, "data.seed was 1, is 2"),
        ("sparsity", 0.5, "sparsity was 0.0001, is 0.5"),
        ("data.batch_size", 32, "data.batch_size was 64, is 32"),
        ("trainer.max_epochs", 4, "trainer.max_epochs was 3, is 4"),
        ("trainer.gradient_clip_val", 1.0, "trainer.gradient_clip_val was None, is 1.0"),
        ("finetune.distill.teacher", None, "finetune.distill.teacher was True, is False"),
        ("model", {"resume": True, "root": 1}, "model.resume was None, is True; model.root was None, is 1"),
    ],
)
def test_what_does(key, value, words):
    assert config_differences(BEFORE, changed(key, value)) == words


def test_tuples_are_the_lists_that_a_file_gives_back():
    assert config_differences({"model": {"widths": (4, "M")}}, {"model": {"widths": [4, "M"]}}) == ""


def test_what_matters_is_flat():
    assert what_matters(BEFORE) == {
        "seed": 1,
        "sparsity": 1e-4,
        "data.batch_size": 64,
        "data.seed": 1,
        "trainer.max_epochs": 3,
        "finetune.distill.teacher": True,
        "finetune.distill.alpha": 0.5,
    }


def test_a_record_goes_round_without_what_is_unknown():
    record = Record({"name": "vgg", "arguments": {"depth": 11}}, [{"a": 1}], stage="prune", metrics={"test/acc": 0.5})
    data = record.to_dict()
    assert data.keys() == {"model", "plans", "stage", "metrics", "format"}
    assert Record.from_dict(data) == record and Record.from_dict(data | {"of a later version": 1}) == record
    with pytest.raises(CheckpointError, match="lacks 'config'"):
        record.need("a.ckpt", "config")


def test_a_failure_does_not_replace_a_finished_result(tmp_path):
    write_failure(tmp_path, "train", "first")
    write_failure(tmp_path, "train", "second", over=False)
    assert json.loads((tmp_path / "result.json").read_text())["error"] == "first"
    write_failure(tmp_path, "train", "third")
    assert json.loads((tmp_path / "result.json").read_text())["error"] == "third" and finished(tmp_path) is None
    Result("train", status="finished", details={"n_test": 3}).write(tmp_path)
    write_failure(tmp_path, "train", "late")
    done = finished(tmp_path)
    assert done["status"] == "finished" and (done["n_test"], done["error"], done["parent"]) == (3, None, None)
