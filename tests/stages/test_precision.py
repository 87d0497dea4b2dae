"""trainer.precision: what auto chooses, that a run keeps it, and what is said of slow ones."""

import json
import os
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, SMALL, compose_config
from slimming import checkpoint, stages
from slimming.errors import CheckpointError, ConfigError
from slimming.stages import precision, running
from slimming.training import launcher

AUTO = "trainer.precision=auto"


@pytest.fixture
def machine(monkeypatch):
    """A function: make this machine's CPU, or GPU, one with the given abilities."""

    def be(*abilities, gpu=None):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(("sse", *abilities), True), False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or gpu)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    return be


def result(out):
    return json.loads((out / "result.json").read_text())


def recorded(path):
    return checkpoint.read(path).content["slimming"]["config"]["trainer"]["precision"]


@pytest.mark.parametrize(
    ("abilities", "gpu", "trainer", "wanted"),
    [
        ((), None, {}, "32-true"),
        (("avx512_bf16",), None, {}, "bf16-mixed"),
        (("amx_bf16",), None, {"accelerator": "cpu"}, "bf16-mixed"),
        ((), True, {"accelerator": "auto"}, "bf16-mixed"),
        (("amx_bf16",), False, {"accelerator": "gpu"}, "16-mixed"),
        ((), True, {"accelerator": "cpu"}, "32-true"),
        (("amx_bf16",), None, {"accelerator": "tpu"}, "32-true"),
        (("amx_bf16",), None, {"strategy": {"_target_": "my.Strategy"}}, "32-true"),
    ],
    ids=str,
)
def test_what_auto_chooses(abilities, gpu, trainer, wanted, machine, capsys):
    machine(*abilities, gpu=gpu)
    assert precision.settled(trainer | {"precision": "auto"}) == trainer | {"precision": wanted}
    said = capsys.readouterr().out
    assert said.startswith(f"trainer.precision=auto: {wanted}, ") and said.count("\n") == 1
    assert precision.settled(trainer | {"precision": "64-true"})["precision"] == "64-true"


def test_old_torch_asks_the_kernel(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(precision.Path, "read_text", lambda self: "flags\t\t: fpu avx512_bf16 sse\n")
    assert precision.native_bf16("cpu")
    monkeypatch.setattr(precision.Path, "read_text", lambda self: "flags\t\t: fpu avx512_bf16x sse\n")
    assert not precision.native_bf16("cpu")


@pytest.mark.parametrize(("began", "goes_on"), [(("amx_bf16",), ()), ((), ("amx_bf16",))], ids=["slower", "faster"])
def test_a_run_keeps_what_it_began_with(began, goes_on, small, machine, tmp_path, capsys):
    machine(*began)
    wanted = "bf16-mixed" if began else "32-true"
    with pytest.raises(SystemExit):
        stages.train(small(AUTO, "+callbacks.stop={_target_: test_train_stage.Stop, epoch: 1}"), tmp_path)
    assert recorded(tmp_path / "last.ckpt") == wanted
    machine(*goes_on)
    stages.train(small(AUTO, "resume=true"), tmp_path)
    assert recorded(tmp_path / "last.ckpt") == result(tmp_path)["config"]["trainer"]["precision"] == wanted
    assert f"trainer.precision=auto: {wanted}, as the run began" in capsys.readouterr().out


def test_one_precision_for_all_stages_also_when_slim_goes_on_elsewhere(small, machine, tmp_path):
    quick = ("ratio=0.5", "trainer.max_epochs=1", "latency_batch=2", "calibrate.batches=1", AUTO)
    machine("avx512_bf16")
    stages.slim(compose_config(*SMALL, *quick, name="slim"), tmp_path)
    machine()
    (tmp_path / "ratio-0.5/finetuned/result.json").unlink()
    (tmp_path / "ratio-0.5/finetuned/last.ckpt").unlink()
    stages.slim(compose_config(*SMALL, *quick, name="slim"), tmp_path)
    for place in ("sparse/last.ckpt", "ratio-0.5/pruned/pruned.ckpt", "ratio-0.5/finetuned/last.ckpt"):
        assert recorded(tmp_path / place) == "bf16-mixed", place
    assert result(tmp_path / "ratio-0.5/pruned")["latency_ms"]["precision"] == "bf16-mixed"


def test_pruning_and_fine_tuning_take_auto(small, machine, tmp_path):
    machine()
    stages.train(small("trainer.max_epochs=1"), tmp_path / "a")
    machine("avx512_bf16")
    options = ("ratio=0.3", "latency_batch=2", "test=false", "calibrate.batches=0", AUTO, "trainer.accelerator=cpu")
    stages.prune(compose_config(f"checkpoint={tmp_path}/a/last.ckpt", *options, name="prune"), tmp_path / "b")
    assert result(tmp_path / "b")["config"]["trainer"]["precision"] == "bf16-mixed"
    assert result(tmp_path / "b")["latency_ms"]["precision"] == "bf16-mixed"
    cfg = compose_config(f"checkpoint={tmp_path}/b/pruned.ckpt", AUTO, name="finetune")
    stages.finetune(cfg, tmp_path / "c")
    assert (
        result(tmp_path / "c")["config"]["trainer"]["precision"] == recorded(tmp_path / "c/last.ckpt") == "bf16-mixed"
    )


def test_ranks_are_told_the_settled_value(machine, tmp_path, monkeypatch, capsys):
    seen = []
    machine("amx_bf16")
    monkeypatch.setattr(launcher, "start_ranks", lambda job, n: seen.append(job["config"]["trainer"]["precision"]))
    monkeypatch.setattr(running, "_processes", lambda trainer: 2)
    stages.run_on_devices("train", compose_config(*SMALL, AUTO), tmp_path)
    assert seen == ["bf16-mixed"] and capsys.readouterr().out.count("precision=auto") == 1


@pytest.mark.parametrize("abilities", [(), ("avx512_bf16",)], ids=["emulated", "native"])
def test_emulation_is_said(abilities, small, machine, tmp_path, capsys):
    machine(*abilities)
    stages.train(small("trainer.precision=bf16-mixed", "trainer.max_epochs=1"), tmp_path / "a")
    told = "this CPU has no native bf16: trainer.precision=bf16-mixed is emulated" in capsys.readouterr().out
    assert told == (not abilities)
    stages.train(small("trainer.max_epochs=1"), tmp_path / "b")
    assert ("hint: this CPU has native bf16" in capsys.readouterr().out) == bool(abilities)


@pytest.mark.filterwarnings("ignore:You passed .*16-mixed")
def test_a_run_in_fp16_does_not_go_on_in_bf16(small, machine, tmp_path):
    machine()
    cfg = small("+callbacks.stop={_target_: test_train_stage.Stop, epoch: 1}")
    with pytest.raises(SystemExit):
        stages.train(cfg, tmp_path)
    content = checkpoint.read(tmp_path / "last.ckpt").content
    content["slimming"]["config"]["trainer"]["precision"] = "16-mixed"
    checkpoint.write(content, tmp_path / "last.ckpt")
    with pytest.raises(ConfigError, match=r"precision=16-mixed needs a GPU.*resume it on one"):
        stages.train(small(AUTO, "resume=true"), tmp_path)


def test_what_a_file_says_of_the_precision_is_not_run(small, tmp_path):
    stages.train(small("trainer.max_epochs=1"), tmp_path)
    content = checkpoint.read(tmp_path / "last.ckpt").content
    content["slimming"]["config"]["trainer"]["precision"] = {"_target_": "os.mkdir", "path": str(tmp_path / "evil")}
    checkpoint.write(content, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="not built on a file's word alone"):
        stages.train(small(AUTO, "resume=true"), tmp_path)
    assert not (tmp_path / "evil").exists()


@pytest.mark.slow
def test_ranks_that_differ_are_refused(tmp_path):
    """Each task of srun composes its own configuration, on its own machine."""
    slurm = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODEID": "0", "SLURM_JOB_NAME": "slimming"}
    slurm |= {"SLURM_JOB_ID": "4243", "SLURM_STEP_ID": "0", "SLURM_NODELIST": "localhost", "SLURM_NNODES": "1"}
    ranks = []
    for task, value in (("0", "32-true"), ("1", "64-true")):
        env = os.environ | slurm | {"SLURM_PROCID": task, "SLURM_LOCALID": task, "MASTER_PORT": "29631"}
        command = [sys.executable, str(ROOT / "train.py"), *SMALL, "trainer.devices=2", f"trainer.precision={value}"]
        ranks.append(subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True))
    for rank in ranks:
        said = rank.communicate(timeout=300)[1]
        assert rank.returncode == 1 and "32-true on rank 0, 64-true on rank 1: all ranks must compute alike" in said
