"""A full disk, a folder without permission, a clock that jumps, data that change between a start and its resume."""

import contextlib
import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from slimming import checkpoint, stages
from slimming.errors import SlimmingError


@contextlib.contextmanager
def tmpfs(folder: Path, options: str):
    """Mount a small file system of its own; skip where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def weights(out):
    return checkpoint.read(out / "last.ckpt").content["state_dict"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def filled(folder: Path) -> Path:
    """Leave no room in a file system."""
    with contextlib.suppress(OSError), (folder / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return folder / "ballast"


@pytest.mark.slow
def test_a_full_disk_is_one_error_and_costs_nothing(small, tmp_path):
    stages.train(small(), tmp_path / "straight")
    with tmpfs(tmp_path / "disk", "size=8m") as disk:
        out = disk / "run"
        stages.train(small("trainer.max_epochs=2"), out)
        kept = weights(out)
        ballast = filled(disk)
        with pytest.raises((SlimmingError, OSError)) as caught:
            stages.train(small(), disk / "second")
        assert isinstance(caught.value, SlimmingError), repr(caught.value)
        assert same(weights(out), kept)
        ballast.unlink()
        stages.train(small("resume=true"), disk / "second")
        assert same(weights(disk / "second"), weights(tmp_path / "straight"))
        assert not list(disk.rglob(".*.tmp"))


@pytest.mark.slow
def test_a_folder_without_permission_is_one_error(small, tmp_path):
    with tmpfs(tmp_path / "disk", "size=8m") as disk:
        remount(disk, "ro")
        with pytest.raises(SlimmingError, match="run"):
            stages.train(small(), disk / "run")
        assert not list(disk.iterdir())


@pytest.mark.slow
def test_a_clock_that_jumps_changes_no_result(small, tmp_path, monkeypatch):
    stages.train(small(), tmp_path / "straight")
    ticks, true = iter(range(10**9)), time.time
    monkeypatch.setattr(time, "time", lambda: true() + (-1) ** next(ticks) * 10**8)  # years back and forth
    stages.train(small(), tmp_path / "jumping")
    assert same(weights(tmp_path / "straight"), weights(tmp_path / "jumping"))
    rows = json.loads((tmp_path / "jumping/result.json").read_text())["history"]
    assert all(0 <= row["time_s"] < 1e4 for row in rows)


def images(root: Path) -> None:
    for part in ("train", "test"):
        for label, name in enumerate("ab"):
            (root / part / name).mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (8, 8), (30 * i, 100 * label, 9)).save(root / part / name / f"{i}.png")


@pytest.mark.slow
@pytest.mark.parametrize("change", ["touched", "class added", "image removed", "root removed"])
def test_data_that_change_before_the_resume(change, small, tmp_path, monkeypatch):
    """The same images give the same bits; others one clear error, or a run that is told so."""
    root = tmp_path / "images"
    images(root)
    options = ("data=image_folder", f"data.root={root}", "data.image_size=8", "data.batch_size=4", "data.crop=0")
    stages.train(small(*options), tmp_path / "straight")
    from slimming.training.recorder import Recorder

    original = Recorder.on_train_epoch_end

    def stop(self, trainer, module):
        original(self, trainer, module)
        raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "on_train_epoch_end", stop)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        stages.train(small(*options), tmp_path / "run")
    monkeypatch.setattr(Recorder, "on_train_epoch_end", original)
    from slimming.stages import building

    building._last_data.cache_clear()
    _change(root, change)
    if change == "touched":
        stages.train(small(*options, "resume=true"), tmp_path / "run")
        assert same(weights(tmp_path / "run"), weights(tmp_path / "straight"))
    else:
        with pytest.raises(SlimmingError):
            stages.train(small(*options, "resume=true"), tmp_path / "run")


def _change(root: Path, change: str) -> None:
    if change == "touched":
        os.utime(root / "train/a/0.png")
    elif change == "class added":
        for part in ("train", "test"):
            (root / part / "c").mkdir()
            Image.new("RGB", (8, 8)).save(root / part / "c/0.png")
    elif change == "image removed":
        (root / "train/a/0.png").unlink()
    else:
        root.rename(root.with_name("elsewhere"))
