"""One folder, one run: claims of run directories, by processes that live, die and start others."""

import errno
import os
import signal
import subprocess
import sys
import threading

import pytest

from conftest import ROOT, SMALL, compose_config
from slimming import config, folders, ranks
from slimming.errors import ConfigError, RunDirectoryError
from slimming.folders import LOCK, claimed, joined

HOLD = """
import os, signal, sys, time
from pathlib import Path
from slimming.folders import claimed
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background with it ignored
with claimed(Path(sys.argv[1])):
    if "fork" in sys.argv and os.fork() == 0:
        print("child", os.getpid(), flush=True)
        time.sleep(600)
    print("claimed", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A function: start another process that claims tmp_path/run; returns it and the numbers that it tells of children."""
    started, children = [], []

    def start(*arguments):
        command = [sys.executable, "-c", HOLD, str(tmp_path / "run"), *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        for _ in range(1 + ("fork" in arguments)):
            children.extend(int(word) for word in process.stdout.readline().split() if word.isdigit())
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
    for child in children:
        os.kill(child, signal.SIGKILL)


def test_a_second_process_is_refused_before_it_writes_and_free_afterwards(holder, tmp_path):
    first, out = holder(), tmp_path / "run"
    (out / ".last.ckpt.tmp").write_text("the first run is writing this")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with (
        pytest.raises(RunDirectoryError, match=rf"still going on \(process {first.pid} on .*give another"),
        claimed(out),
    ):
        pass
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    first.send_signal(signal.SIGINT)
    first.wait()
    with claimed(out):
        assert os.listdir(out) == [LOCK]
    assert os.listdir(out) == []


def test_a_killed_run_blocks_nothing_even_if_its_children_live(holder, tmp_path):
    first, out = holder("fork"), tmp_path / "run"
    (out / ".last.ckpt.tmp").write_text("half")
    first.kill()
    first.wait()
    assert (out / LOCK).exists()
    with claimed(out):
        assert os.listdir(out) == [LOCK]  # and its left-overs are gone


def test_a_thread_claims_again_what_it_has_and_no_other_thread_does(tmp_path):
    caught = []

    def other():
        try:
            with claimed(tmp_path):
                pass
        except RunDirectoryError as error:
            caught.append(error)

    with claimed(tmp_path), claimed(tmp_path / "." / ""):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(caught) == 1 and os.listdir(tmp_path) == []
    other()
    assert len(caught) == 1


def test_the_ranks_that_a_run_starts_share_its_claim(holder, tmp_path):
    holder()
    with joined(tmp_path / "run"), claimed(tmp_path / "run"):
        pass
    with pytest.raises(RunDirectoryError), claimed(tmp_path / "run"):
        pass


def _be_rank(monkeypatch, rank, port):
    for key, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2), ("MASTER_PORT", port)):
        monkeypatch.setenv(key, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")


def test_ranks_of_one_job_share_a_folder_and_those_of_another_do_not(holder, tmp_path, monkeypatch):
    _be_rank(monkeypatch, 0, 7000)
    holder()
    _be_rank(monkeypatch, 1, 7000)
    assert ranks.job() == "localhost:7000"
    with claimed(tmp_path / "run"):
        pass
    assert (tmp_path / "run" / LOCK).exists()  # rank 0 holds it
    _be_rank(monkeypatch, 1, 7001)
    with pytest.raises(RunDirectoryError, match="still going on"), claimed(tmp_path / "run"):
        pass


def test_a_rank_does_not_stumble_over_a_dead_job(holder, tmp_path, monkeypatch):
    _be_rank(monkeypatch, 0, 7000)
    dead = holder()
    dead.kill()
    dead.wait()
    _be_rank(monkeypatch, 1, 7001)
    with claimed(tmp_path / "run"):
        pass


def test_a_file_system_without_locks_is_named_not_refused(tmp_path, monkeypatch, capsys):
    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folders.fcntl, "flock", flock)
    with claimed(tmp_path):
        pass
    assert "has no file locks (No locks available)" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_an_error_of_ours(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"cannot be written .* give another hydra\.run\.dir"),
        claimed(tmp_path / "file/x"),
    ):
        pass


def test_a_lock_of_another_run_is_not_removed_with_ours(tmp_path):
    """The folder was moved while its run went on, and another run has begun under the old name."""
    out = tmp_path / "run"
    with claimed(out):
        out.rename(tmp_path / "moved")
        out.mkdir()
        (out / LOCK).write_text("{}")
    assert (out / LOCK).exists()


def test_hydra_writes_its_record_only_into_a_folder_of_ones_own(holder, tmp_path, monkeypatch):
    assert config.record_folder(".hydra", None) == ".hydra"  # as for --cfg
    assert config.record_folder(".hydra", str(tmp_path / "free")) == ".hydra"
    assert (tmp_path / "free" / LOCK).exists()
    folders.release(tmp_path / "free")
    holder()
    assert config.record_folder(".hydra", str(tmp_path / "run")) is None
    monkeypatch.setenv("RANK", "1")
    assert config.record_folder(".hydra", str(tmp_path / "free")) is None


def test_runs_started_in_the_same_second_get_folders_of_their_own():
    assert len({ranks.started() for _ in range(50)}) == 50


def _content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


STARTS = {
    "train": SMALL,
    "slim": (*SMALL, "ratio=0.5"),
    "prune": ("checkpoint=none", "ratio=0.5"),
    "finetune": ("checkpoint=none",),
}


@pytest.mark.parametrize("stage", STARTS)
def test_every_stage_is_refused_in_the_folder_of_a_run_that_goes_on(stage, holder, tmp_path):
    from slimming import stages

    holder()
    out = tmp_path / "run"
    (out / "last.ckpt").write_text("of the first run")
    (out / ".last.ckpt.tmp").write_text("being written")
    before, cfg = _content(out), compose_config(*STARTS[stage], name=stage)
    with pytest.raises(RunDirectoryError, match="still going on"):
        stages.run_on_devices(stage, cfg, out) if stage in config.DISTRIBUTED else getattr(stages, stage)(cfg, out)
    assert _content(out) == before


def test_a_stage_of_slim_is_refused_where_another_run_has_taken_its_folder(tmp_path):
    from slimming.stages import running

    with claimed(tmp_path):
        command = [sys.executable, "-c", HOLD, str(tmp_path / "sparse")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
            other.stdout.readline()
            with pytest.raises(RunDirectoryError):
                running.run_on_devices("train", compose_config(*SMALL), tmp_path / "sparse")
            other.kill()


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["-m"]], ids=["single", "sweep"])
def test_the_command_line_is_refused_before_it_writes(arguments, holder, tmp_path):
    first, out = holder(), tmp_path / "run"
    place = ["hydra.sweep.dir=.", "hydra.sweep.subdir=run"] if arguments else [f"hydra.run.dir={out}", "resume=true"]
    command = [sys.executable, str(ROOT / "train.py"), *arguments, *SMALL, *place]
    before = _content(out)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"still going on (process {first.pid} on" in done.stderr
    assert _content(out) == before
