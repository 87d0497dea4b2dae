"""Files: whole or not there, data and never code, rebuilt in two lines."""

import errno
import os
import pickle
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import slimming
from slimming import checkpoint, models, records
from slimming.errors import CheckpointError, SlimmingError

ARGUMENTS = {"widths": [4, "M", 6], "num_classes": 3}


def content(network=None, **record):
    network = network or models.vgg(**ARGUMENTS)
    base = {"format": records.RECORD_FORMAT, "model": {"name": "vgg", "arguments": ARGUMENTS}, "plans": []}
    return {"state_dict": {f"model.{k}": v for k, v in network.state_dict().items()}, "slimming": base | record}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "last.ckpt"


def test_round_trip(path):
    model = models.vgg(**ARGUMENTS).eval()
    checkpoint.write(content(model), path)
    x = torch.randn(2, 3, 8, 8)
    loaded = checkpoint.load(path)
    assert not loaded.training and torch.equal(loaded(x), model(x))
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_a_network_that_is_not_registered_is_given(path):
    net = nn.Sequential(nn.Linear(2, 3))
    checkpoint.write(content(net, model=None), path)
    with pytest.raises(CheckpointError, match=r"load\(path, model="):
        checkpoint.load(path)
    blank = nn.Sequential(nn.Linear(2, 3))
    loaded = checkpoint.load(path, model=blank)
    assert torch.equal(loaded[0].weight, net[0].weight) and not torch.equal(blank[0].weight, net[0].weight)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: None, "there is no checkpoint"),
        (lambda p: p.write_bytes(b"not a checkpoint"), "cannot be read|damaged"),
        (lambda p: (checkpoint.write(content(), p), p.write_bytes(p.read_bytes()[:3000])), "truncated"),
        (lambda p: torch.save({"state_dict": {}}, p), "was not written by slimming"),
        (lambda p: torch.save([1], p), "was not written by slimming"),
        (lambda p: checkpoint.write(content(format=99), p), "has format 99, this version reads format 1"),
        (lambda p: torch.save(content() | {"x": Evil()}, p), "could run code"),
        (lambda p: p.write_bytes(pickle.dumps(Evil())), "could run code|cannot be read"),
        (
            lambda p: checkpoint.write(content(model={"name": "os.system", "arguments": {}}), p),
            "no model is registered",
        ),
        (lambda p: checkpoint.write(content(models.vgg(widths=[4, "M", 7])), p), r"another architecture.*feature\.4"),
    ],
)
def test_bad_files(damage, words, path, monkeypatch):
    monkeypatch.chdir(path.parent)
    damage(path)
    with pytest.raises(ValueError, match=words):
        checkpoint.load(path)
    assert not (path.parent / "evil").exists()


def test_a_full_disk_leaves_the_last_good_file(path, monkeypatch):
    checkpoint.write(content(), path)
    before = path.read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"the disk is full.*last good last.ckpt is still there"):
        checkpoint.write(content(), path)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["last.ckpt"]


def test_a_file_that_the_system_cuts_off_is_not_left_behind(path):
    """A real refusal of the operating system in the middle of the file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot be written .* nothing was left behind"):
            checkpoint.write({"x": torch.zeros(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert os.listdir(path.parent) == []


def test_a_kill_while_writing_leaves_a_loadable_file(path):
    code = (
        "import sys, torch; from slimming import checkpoint\n"
        "for i in range(10**6): checkpoint.write({'i': i, 'x': torch.full((500_000,), i)}, sys.argv[1])"
    )
    for delay in (0.0, 0.013, 0.029):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)])
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.1 + delay)
        process.kill()
        process.wait()
        saved = torch.load(path, weights_only=True)
        assert (saved["x"] == saved["i"]).all()
        path.unlink()


def test_loading_is_bit_identical_in_a_fresh_process_without_lightning(path):
    model = models.vgg(**ARGUMENTS).eval()
    checkpoint.write(content(model), path)
    code = (
        "import sys, torch, slimming; model = slimming.load(sys.argv[1])\n"
        "assert not {'lightning', 'hydra'} & set(sys.modules)\n"
        "torch.manual_seed(0); print(model(torch.randn(2, 3, 8, 8)).detach().view(torch.int32).tolist())"
    )
    out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    torch.manual_seed(0)
    assert out.strip() == str(model(torch.randn(2, 3, 8, 8)).detach().view(torch.int32).tolist())


def thin_network():
    torch.manual_seed(0)
    dense = models.vgg(**ARGUMENTS).eval()
    with torch.no_grad():
        for norm in (m for m in dense.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.uniform_()
    plan = slimming.trace(dense, torch.zeros(1, 3, 8, 8)).plan(slimming.GlobalRatio(0.5))
    return dense, slimming.prune(dense, plan), plan


@pytest.mark.parametrize("registered", [True, False])
def test_what_is_saved_loads(registered, path):
    dense, thin, plan = thin_network()
    name = {"name": "vgg", "arguments": ARGUMENTS} if registered else None
    slimming.save(path, thin, plans=[plan], dense=name)
    again = slimming.load(path) if registered else slimming.load(path, model=dense)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(again(images), thin(images)) and again.feature[0].out_channels < 4
    if not registered:
        with pytest.raises(CheckpointError, match="not registered"):
            slimming.load(path)


def test_what_would_not_load_is_not_saved(path):
    _, thin, plan = thin_network()
    with pytest.raises(CheckpointError, match="another architecture"):
        slimming.save(path, thin, dense={"name": "vgg", "arguments": ARGUMENTS})  # the plan is missing
    with pytest.raises(SlimmingError, match="no model is registered"):
        slimming.save(path, thin, plans=[plan], dense={"name": "net", "arguments": {}})
    with pytest.raises(CheckpointError, match="model in its 'slimming' record"):
        slimming.save(path, thin, plans=[plan], dense={"name": "vgg"})
    assert not path.exists()
