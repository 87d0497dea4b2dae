"""One folder, one run, for every stage; and a record of every failure that is the run's own."""

import json
import os
import subprocess
import sys
import time

import pytest

from conftest import ROOT, SMALL, compose_config
from slimming import stages
from slimming.errors import CheckpointError, ConfigError, RunDirectoryError
from slimming.stages import recording, running
from slimming.training import launcher

HOLD = (
    "import sys, time; from pathlib import Path; from slimming.folders import claimed\n"
    "with claimed(Path(sys.argv[1])): print('claimed', flush=True); time.sleep(600)"
)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    out = tmp_path_factory.mktemp("sparse")
    stages.train(compose_config(*SMALL, "trainer.max_epochs=1"), out)
    return out / "last.ckpt"


@pytest.fixture
def busy(tmp_path):
    """The folder of a run that goes on in another process, with its files."""
    out = tmp_path / "busy"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE)
    holder.stdout.readline()
    (out / ".last.ckpt.tmp").write_text("being written")
    (out / "result.json").write_text(json.dumps({"status": "failed", "error": "interrupted", "stage": "train"}))
    yield out
    holder.kill()
    holder.wait()


def job(stage, sparse):
    names = {"train": "train", "run": "train", "slim": "slim", "prune": "prune", "finetune": "finetune"}
    base = SMALL if stage in ("train", "run", "slim") else (f"checkpoint={sparse}",)
    return compose_config(*base, *["ratio=0.5"] * (stage in ("slim", "prune")), name=names[stage])


def content(out):
    return {str(p): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def result(out):
    return json.loads((out / "result.json").read_text())


@pytest.mark.parametrize("stage", ["prune", "finetune"])
def test_a_stage_does_not_begin_in_the_folder_of_another(stage, sparse):
    before = content(sparse.parent)
    with pytest.raises(RunDirectoryError, match=r"holds a (run already|finished run of train)"):
        getattr(stages, stage)(job(stage, sparse), sparse.parent)
    assert content(sparse.parent) == before


def test_the_record_of_an_interrupted_run_survives_those_who_are_refused(sparse, tmp_path):
    cfg = compose_config(*SMALL, "+callbacks.stop={_target_: test_train_stage.Stop, epoch: 1}")
    with pytest.raises(SystemExit):
        stages.train(cfg, tmp_path)
    before = content(tmp_path)
    for stage, overrides, words in (
        ("train", (), "holds a run already"),
        ("train", ("resume=true", "sparsity=0.5"), r"another configuration: sparsity was 0\.0001, is 0\.5"),
        ("prune", ("ratio=0.5",), "holds a run already"),
        ("finetune", (), "holds a run already"),
    ):
        base = SMALL if stage == "train" else (f"checkpoint={sparse}",)
        with pytest.raises(RunDirectoryError, match=words):
            stages.run_on_devices(
                stage, compose_config(*base, *overrides, name=stage), tmp_path
            ) if stage != "prune" else (stages.prune(compose_config(*base, *overrides, name=stage), tmp_path))
    assert content(tmp_path) == before and result(tmp_path)["error"] == "interrupted"


def test_ranks_are_refused_as_their_class_of_error_says(tmp_path, monkeypatch):
    """An error of a rank comes back as what it was, so that a refusal is not written over another run's record."""
    (tmp_path / "result.json").write_text("{}")

    def start_ranks(job, processes):
        told = {"rank": 0, "time": 0, "kind": "ours", "class": "RunDirectoryError", "message": "taken", "traceback": ""}
        (tmp_path / "error-0.json").write_text(json.dumps(told))
        launcher._raise_first(tmp_path, [1, None])

    monkeypatch.setattr(launcher, "start_ranks", start_ranks)
    monkeypatch.setattr(running, "_processes", lambda trainer: 2)
    with pytest.raises(RunDirectoryError, match="taken"):
        stages.run_on_devices("train", compose_config(*SMALL), tmp_path)
    assert (tmp_path / "result.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("stage", "overrides", "error", "words"),
    [
        ("finetune", ["checkpoint=nowhere.ckpt"], CheckpointError, "there is no checkpoint nowhere.ckpt"),
        ("prune", ["checkpoint=nowhere.ckpt", "ratio=0.5"], CheckpointError, "there is no checkpoint nowhere.ckpt"),
        ("train", [*SMALL, "resume=true"], CheckpointError, "is not a checkpoint of ours"),
        ("run train", [*SMALL, f"trainer.devices={(os.cpu_count() or 1) + 1}"], ConfigError, "this machine has no GPU"),
        ("run finetune", ["checkpoint=nowhere.ckpt"], CheckpointError, "there is no checkpoint nowhere.ckpt"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_an_early_failure_is_recorded_too(stage, overrides, error, words, tmp_path):
    if overrides[-1] == "resume=true":
        (tmp_path / "last.ckpt").write_bytes(b"damaged")
    name = stage.rpartition(" ")[2]
    cfg = compose_config(*overrides, name=name)
    with pytest.raises(error, match=words):
        stages.run_on_devices(name, cfg, tmp_path) if stage != name else getattr(stages, stage)(cfg, tmp_path)
    assert (result(tmp_path)["status"], result(tmp_path)["stage"]) == ("failed", name)
    assert words.split(" is no ")[0] in result(tmp_path)["error"]


def test_left_overs_of_a_killed_run_are_cleared_by_the_next_start(tmp_path):
    for name in (".last.ckpt.tmp", ".metrics.csv.tmp", ".lock"):
        (tmp_path / name).write_text("half")
    stages.train(compose_config(*SMALL, "trainer.max_epochs=1", "resume=true"), tmp_path)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_pruning_that_is_done_again_keeps_its_claim(sparse, tmp_path, monkeypatch):
    """slim empties the folder of an interrupted pruning, but not of the lock that keeps others out."""
    quick = ("latency_batch=0", "calibrate.batches=0", "test=false", "trainer.max_epochs=1", "ratio=0.5")
    out = tmp_path / "ratio-0.5" / "pruned"
    (out / "left").mkdir(parents=True)
    (out / "plan.json").write_text("half")
    seen = []
    monkeypatch.setattr(recording, "versions", lambda: seen.append(os.listdir(out)) if out.exists() else None)
    stages.slim(compose_config(*SMALL, *quick, name="slim"), tmp_path)
    assert [".lock"] in seen and (out / "pruned.ckpt").exists() and not (out / "left").exists()


@pytest.mark.slow
def test_two_commands_with_the_same_folder(tmp_path):
    """The second neither trains nor touches Hydra's record of the first; automatic folders do not meet at all."""

    def start(*arguments):
        command = [sys.executable, str(ROOT / "train.py"), *SMALL, "trainer.max_epochs=100000", *arguments]
        return subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)

    first = start("sparsity=0.01", "hydra.run.dir=run")
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run/last.ckpt").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        for more in (["sparsity=0.5"], ["sparsity=0.01", "resume=true"]):
            second = start("hydra.run.dir=run", *more)
            said = second.communicate(timeout=120)[1]
            assert second.returncode == 1 and f"still going on (process {first.pid}" in said, said
        assert "sparsity=0.01" in (tmp_path / "run/.hydra/overrides.yaml").read_text()
        assert first.poll() is None and not (tmp_path / "run/result.json").exists()
    finally:
        first.kill()
        first.communicate()
    again = start("sparsity=0.01", "hydra.run.dir=run", "resume=true", "trainer.max_epochs=1")
    assert "holds a run with another configuration" in again.communicate(timeout=120)[1]
