"""Several processes: the same results as one, one run directory, and one ending for all. gloo on the CPU throughout."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image
from torch import nn

import slimming
from conftest import ROOT, SMALL, compose_config
from slimming import checkpoint, models, ranks, stages
from slimming.channels.layers import SelectBatchNorm, synchronise
from slimming.errors import ConfigError, SlimmingError, TrainingError
from slimming.stages import running
from slimming.training import launcher

HERE = Path(__file__).parent
EXACT = ("trainer.precision=64-true", "data.augment=false", "sparsity=0.01", "trainer.limit_train_batches=6")
TWO = ("trainer.devices=2",)


class Frozen(Callback):
    """BatchNorms keep their statistics; every rank leaves its weights in the run directory."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.eval()

    def on_train_end(self, trainer, module):
        torch.save(module.model.state_dict(), f"{trainer.default_root_dir}/rank{trainer.global_rank}.pt")


class Dies(Callback):
    def __init__(self, how: str, rank: int = 1):
        self.how, self.rank = how, rank

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_rank == self.rank and batch_idx == 1:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise (SlimmingError if self.how == "ours" else ZeroDivisionError)("the first cause")


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """The ranks import the callbacks above; each takes one thread."""
    monkeypatch.setenv("PYTHONPATH", f"{HERE}:{HERE.parent}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def result(out):
    return json.loads((out / "result.json").read_text())


def run(out, *overrides, stage="train"):
    kept = [o for o in SMALL if o.partition("=")[0] not in {x.partition("=")[0] for x in overrides}]
    base = kept if stage in ("train", "slim") else []
    return stages.run_on_devices(stage, compose_config(*base, *overrides, name=stage), out)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_equal_one_with_the_same_global_batch(accumulate, tmp_path, monkeypatch):
    """Also inside a SLURM job of one task, whose variables are not about these ranks."""
    for key, value in (("NTASKS", "1"), ("PROCID", "0"), ("LOCALID", "0"), ("JOB_ID", "7"), ("NODEID", "0")):
        monkeypatch.setenv(f"SLURM_{key}", value)
    setting = (*EXACT, f"trainer.accumulate_grad_batches={accumulate}", "+callbacks.f._target_=test_devices.Frozen")
    one = run(tmp_path / "one", *setting)
    two = run(tmp_path / "two", *setting, *TWO)
    load = lambda name: torch.load(tmp_path / name, weights_only=True)  # noqa: E731
    alone, first, second = (load(f"{n}.pt") for n in ("one/rank0", "two/rank0", "two/rank1"))
    for key in alone:
        torch.testing.assert_close(first[key], alone[key], rtol=1e-12, atol=1e-12)
        assert torch.equal(first[key], second[key]), key
    assert two == one and result(tmp_path / "two")["n_test"] == 359  # an odd number: to the last image
    for a, b in zip(*(result(tmp_path / n)["history"] for n in ("one", "two")), strict=True):
        for key in ("train/loss", "train/penalty", "train/acc", "test/loss", "test/acc"):
            assert b[key] == pytest.approx(a[key], rel=1e-5), key
    assert (
        not {p.name for p in (tmp_path / "two").iterdir()}
        - {p.name for p in (tmp_path / "one").iterdir()}
        - {"rank1.pt"}
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("killed", r"rank 1 was killed \(signal 9"),
        ("ours", "^the first cause$"),
        ("other", "rank 1 failed: ZeroDivisionError: the first cause; the other ranks were ended"),
    ],
)
def test_a_rank_that_dies_ends_all_within_seconds(how, words, tmp_path, capfd):
    callback = f"+callbacks.d={{_target_: test_devices.Dies, how: {how}}}"
    start = time.monotonic()
    with pytest.raises((SlimmingError, TrainingError), match=words):
        run(tmp_path, callback, *TWO, "trainer.max_epochs=1000")
    assert time.monotonic() - start < 60
    assert result(tmp_path)["status"] == "failed"
    assert "Connection" not in result(tmp_path)["error"]  # the cause, not what other ranks made of it
    assert capfd.readouterr().err.count("first cause") <= 2  # the exception's line in one traceback
    left = subprocess.run(
        ["pgrep", "-fc", "-P", str(os.getpid()), "slimming.entry"], capture_output=True, text=True
    ).stdout
    assert int(left) == 0


@pytest.mark.slow
def test_killing_the_outer_process_ends_the_ranks(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, *TWO, "trainer.max_epochs=100000"]
    outer = subprocess.Popen([*command, f"hydra.run.dir={tmp_path}/run"], cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    outer.kill()
    outer.wait()
    time.sleep(2)
    assert subprocess.run(["pgrep", "-f", f"{tmp_path}/run"], capture_output=True).returncode == 1
    assert checkpoint.read(tmp_path / "run/last.ckpt").content["epoch"] >= 0


@pytest.mark.slow
def test_the_whole_pipeline_in_two_processes(tmp_path):
    quick = ("latency_batch=0", "calibrate.batches=2", "ratio=0.5", "sparsity=0.01", "finetune.max_epochs=1")
    cfg = compose_config(*SMALL, *quick, *TWO, name="slim")
    assert 0 <= stages.slim(cfg, tmp_path) <= 1
    tuned = result(tmp_path / "ratio-0.5/finetuned")
    assert tuned["config"]["trainer"]["devices"] == 2  # inherited from the sparse training
    slimming.load(tmp_path / "ratio-0.5/finetuned/last.ckpt")
    assert (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_a_sweep_of_several_processes_goes_on_past_a_failing_job(tmp_path):
    arguments = [*SMALL, *TWO, "sparsity=0.01,0.02", "data.batch_size=64,33"]
    command = [sys.executable, str(ROOT / "train.py"), "-m", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.count("job 1 failed: data.batch_size=33 must be a multiple of the 2 devices") == 1
    folders = sorted((tmp_path / "runs/train_sweep").glob("*/*/"))
    assert [f.name[0] for f in folders] == ["0", "1", "2", "3"]
    assert [result(f)["status"] for f in folders] == ["finished", "failed"] * 2
    sparsities = [yaml_value(f / ".hydra/config.yaml", "sparsity") for f in folders]
    assert sparsities == [0.01, 0.01, 0.02, 0.02] and len(list((tmp_path / "runs").glob("*/*"))) == 1


def yaml_value(path, key):
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"{key}:"))
    return float(line.split(":")[1])


@pytest.mark.slow
def test_torchrun_agrees_on_one_run_directory(tmp_path):
    small = [o for o in SMALL if "devices" not in o]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29617"]
    done = subprocess.run(
        [*command, str(ROOT / "train.py"), *small], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (out,) = (tmp_path / "runs/train").glob("*/*")
    assert result(out)["status"] == "finished" and done.stdout.count("test accuracy") == 1
    assert (out / ".hydra/config.yaml").exists()
    refused = [*command, str(ROOT / "slim.py"), *small, "ratio=0.5"]
    done = subprocess.run(refused, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and done.stderr.count("slim.py takes one process") == 1


@pytest.mark.slow
def test_slurms_tasks_find_each_other(tmp_path):
    """srun starts the processes; Lightning reads SLURM's variables."""
    slurm = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODEID": "0", "SLURM_JOB_NAME": "slimming"}
    slurm |= {"SLURM_JOB_ID": "4242", "SLURM_STEP_ID": "0", "SLURM_NODELIST": "localhost", "SLURM_NNODES": "1"}
    slurm |= {"MASTER_PORT": "29618"}
    ranks = []
    for task in ("0", "1"):
        env = os.environ | slurm | {"SLURM_PROCID": task, "SLURM_LOCALID": task}
        command = [sys.executable, str(ROOT / "train.py"), *SMALL, *TWO]
        ranks.append(subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True))
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    (out,) = (tmp_path / "runs/train").glob("*/*")
    assert out.name == "slurm-4242-0" and result(out)["status"] == "finished"
    assert "test accuracy" in said[0] and "test accuracy" not in said[1]


@pytest.mark.slow
def test_the_slurm_launcher_submits_a_script_with_our_values(tmp_path, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text("#!/bin/sh\n")
    (tools / "sbatch").write_text(f'#!/bin/sh\ncp "$1" {tmp_path}/submitted.sh\necho refused >&2\nexit 1\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    options = [
        "hydra/launcher=slurm",
        "hydra.launcher.partition=gpu",
        "hydra.launcher.tasks_per_node=4",
        "trainer.devices=4",
    ]
    command = [sys.executable, str(ROOT / "train.py"), "-m", *SMALL, *options, "sparsity=1e-4,1e-3"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    script = (tmp_path / "submitted.sh").read_text()
    for line in ("--partition=gpu", "--ntasks-per-node=4", "--gpus-per-node=4", "--array=0-1", "srun"):
        assert line in script, script


def test_what_the_machine_cannot_do_is_refused(tmp_path):
    cores = os.cpu_count()
    for overrides, words in (
        (
            [f"trainer.devices={cores + 1}"],
            f"trainer.devices={cores + 1}: this machine has no GPU for it and {cores} CPU",
        ),
        (["trainer.num_nodes=2"], r"trainer.num_nodes=2 needs a launcher .* torchrun --nnodes=2"),
        (["trainer.accelerator=gpu", "trainer.devices=2"], "trainer: .*gpu"),
    ):
        if "gpu" in overrides[0] and torch.cuda.is_available():
            continue
        with pytest.raises(ConfigError, match=words):
            run(tmp_path / "run", *overrides)
    with pytest.raises(ConfigError, match=r"trainer\.sync_batchnorm would forget"):
        run(tmp_path / "run", "+trainer.sync_batchnorm=true")
    with pytest.raises(ConfigError, match=r"trainer\.devices must be 1"):
        compose_config("checkpoint=x", "ratio=0.5", "trainer.devices=2", name="prune")


@pytest.mark.slow
def test_synchronised_batchnorm_needs_gpus(tmp_path):
    with pytest.raises(SlimmingError, match="sync_batchnorm=true needs GPUs"):
        run(tmp_path, *TWO, "sync_batchnorm=true")


def test_one_device_needs_no_synchronisation(tmp_path):
    run(tmp_path, "sync_batchnorm=true", "trainer.max_epochs=1")
    assert result(tmp_path)["status"] == "finished"


def test_synchronised_networks_keep_parameters_keys_and_indices():
    torch.manual_seed(0)
    model = models.preresnet(depth=20).double()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight)
    example = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    thin = slimming.prune(model, slimming.trace(model, example).plan(slimming.GlobalRatio(0.5), ties="apart"))
    selects = [isinstance(m, SelectBatchNorm) for m in thin.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert any(selects) and not all(selects)
    before, parameters = thin.eval()(example), list(thin.parameters())
    state = {k: v.clone() for k, v in thin.state_dict().items()}
    indices = [(m.select, m.scatter, m.width) for m in thin.modules() if isinstance(m, SelectBatchNorm)]
    turned = synchronise(thin)
    norms = [m for m in turned.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert all(isinstance(m, nn.SyncBatchNorm) for m in norms) and len(norms) == len(selects)
    assert [isinstance(m, SelectBatchNorm) for m in norms] == selects
    assert [(m.select, m.scatter, m.width) for m in norms if isinstance(m, SelectBatchNorm)] == indices
    assert all(a is b for a, b in zip(turned.parameters(), parameters, strict=True))
    assert turned.state_dict().keys() == state.keys()
    assert torch.equal(turned.eval()(example), before)
    assert synchronise(turned) is turned and len(list(slimming.Penalty({}, 0).gammas)) == 0


def test_the_time_of_a_start_is_shared(monkeypatch):
    assert ranks.started()[:2] == "20"
    for key, value in (("SLURM_NTASKS", "4"), ("SLURM_PROCID", "3"), ("SLURM_JOB_ID", "7"), ("SLURM_STEP_ID", "2")):
        monkeypatch.setenv(key, value)
    assert ranks.started() == "slurm-7-2" and ranks.started_externally() and ranks.rank() == 3


def test_how_torchrun_lays_out_devices(monkeypatch):
    assert ranks.torchrun_devices() == {}
    for key, value in (("WORLD_SIZE", "8"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(key, value)
    assert ranks.torchrun_devices() == {"devices": 4, "num_nodes": 2}


def test_a_job_survives_its_description(tmp_path, monkeypatch):
    """What `run` writes down for the ranks is what they get."""
    seen = []
    monkeypatch.setattr(launcher, "start_ranks", lambda job, n: seen.append((json.loads(json.dumps(job)), n)))
    cfg = compose_config(*SMALL, *TWO, "penalty.layers=[feature.*]")
    stages.run_on_devices("train", cfg, tmp_path)
    monkeypatch.setitem(running.DISTRIBUTED, "train", lambda c, out: seen.append((c, out)))
    running.run_job(seen[0][0])
    assert seen[0][1] == 2 and seen[1] == (cfg, tmp_path)


@pytest.mark.slow
def test_an_imagenet_like_folder_end_to_end_in_two_processes(tmp_path):
    """Trained, pruned, calibrated and fine-tuned from files that are decoded on the way."""
    pixels = torch.Generator().manual_seed(0)
    for part, count in (("train", 8), ("val", 3)):
        for name in "ab":
            (tmp_path / "tree" / part / name).mkdir(parents=True)
            for i in range(count):
                image = torch.randint(256, (40, 48, 3), generator=pixels, dtype=torch.uint8).numpy()
                Image.fromarray(image).save(tmp_path / "tree" / part / name / f"{i}.jpg")
    data = [
        "data=imagenet",
        f"data.root={tmp_path}/tree",
        "data.image_size=32",
        "data.batch_size=8",
        "data.num_workers=1",
    ]
    train = ["model=torchvision", "model.name=resnet18", "trainer.accelerator=cpu", "trainer.max_epochs=1", *TWO]
    stages.run_on_devices(
        "train", compose_config(*data, *train, "trainer.enable_progress_bar=false"), tmp_path / "sparse"
    )
    options = (f"checkpoint={tmp_path}/sparse/last.ckpt", "ratio=0.5", "latency_batch=0", "calibrate.batches=3")
    stages.prune(compose_config(*options, "trainer.accelerator=cpu", name="prune"), tmp_path / "pruned")
    cfg = compose_config(f"checkpoint={tmp_path}/pruned/pruned.ckpt", name="finetune")
    accuracy = stages.run_on_devices("finetune", cfg, tmp_path / "tuned")
    assert result(tmp_path / "tuned")["n_test"] == 6 and round(accuracy * 6) == pytest.approx(accuracy * 6)
    assert result(tmp_path / "tuned")["cost"]["num_params"] < 0.5 * result(tmp_path / "sparse")["cost"]["num_params"]
