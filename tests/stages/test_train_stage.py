"""The training stage from configuration to files, and everything that may go wrong on the way."""

import csv
import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image

import slimming
from conftest import ROOT, SMALL
from slimming import checkpoint, stages
from slimming.data import Digits
from slimming.errors import CheckpointError, ConfigError, DataError, TrainingError

LEFT = {"last.ckpt", "result.json", "metrics.csv", "curves.png", "gammas.png"}


class Stop(Callback):
    """Ctrl-C in the middle of an epoch."""

    def __init__(self, epoch: int):
        self.epoch = epoch

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == 1:
            raise KeyboardInterrupt


class Poison(Callback):
    """A weight becomes NaN in the middle of the second epoch."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 1:
            torch.nn.init.constant_(module.model.classifier.weight, math.nan)


@pytest.fixture(autouse=True)
def _signals():
    """Lightning ignores further Ctrl-C after the first; the test process must not."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def result(out):
    return json.loads((out / "result.json").read_text())


def weights(out):
    return checkpoint.read(out / "last.ckpt").content["state_dict"]


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_training_leaves_its_record(small, tmp_path, capsys):
    cfg = small("sparsity=0.01")
    accuracy = stages.train(cfg, tmp_path / "run")
    out = tmp_path / "run"
    assert set(os.listdir(out)) == LEFT
    record = result(out)
    assert (record["status"], record["stage"], record["role"], record["error"]) == ("finished", "train", "sparse", None)
    assert (record["model"], record["data"], record["seed"], record["n_test"]) == ("vgg11", "digits", 1, 359)
    assert record["metrics"]["test/acc"] == accuracy == record["history"][-1]["test/acc"]
    assert [row["epoch"] for row in record["history"]] == [1, 2]
    assert [row["lr"] for row in record["history"]] == pytest.approx([0.1, 0.01])
    assert [sum(c) for c in record["gammas"]["counts"]] == [10, 10, 10]
    with (out / "metrics.csv").open() as file:
        assert [float(r["train/loss"]) for r in csv.DictReader(file)] == [r["train/loss"] for r in record["history"]]
    for name in ("curves.png", "gammas.png"):
        Image.open(out / name).verify()
    model = slimming.load(out / "last.ckpt")
    data = Digits(image_size=8)
    data.setup()
    images, labels = data.on_after_batch_transfer(data.splits["test"].__getitems__(list(range(359))), 0)
    assert float((model(images).argmax(1) == labels).double().mean()) == pytest.approx(accuracy, abs=1e-6)
    gammas = [m.weight for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    penalty = 0.01 * sum(float(g.abs().sum()) for g in gammas)
    assert record["history"][-1]["train/penalty"] == pytest.approx(penalty, rel=1e-5)
    text = capsys.readouterr().out
    assert "maximum shrinkage" in text and "WARNING" in text and "Warning" not in text


def test_the_same_command_gives_the_same_weights(small, tmp_path):
    for name in "ab":
        stages.train(small(), tmp_path / name)
    stages.train(small("seed=2"), tmp_path / "c")
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not equal(weights(tmp_path / "a"), weights(tmp_path / "c"))


@pytest.mark.parametrize(
    "setting",
    [
        ["data.val_size=0.2"],
        [
            "model=torchvision",
            "model.name=mobilenet_v2",
            "optimizer.lr=0.01",
            "trainer.limit_val_batches=1",
            "trainer.limit_test_batches=1",
            "data.image_size=32",  # bf16 depthwise gradients of 1x1 images are sometimes NaN in torch itself
            "trainer.accumulate_grad_batches=3",
            "trainer.precision=bf16-mixed",
        ],
        ["optimizer=adamw", "scheduler=cosine"],
        ["sparsity=auto", "target_ratio=0.5"],
    ],
    ids=["validation", "dropout", "adamw", "auto"],
)
def test_resumed_equals_uninterrupted(setting, small, tmp_path, capsys):
    overrides = [o for o in SMALL if not (setting[0].startswith("model=") and o.startswith("model"))]
    overrides += ["trainer.max_epochs=3", *setting]
    from conftest import compose_config

    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    stages.train(compose_config(*overrides), straight)
    with pytest.raises(SystemExit):
        stages.train(compose_config(*overrides, "+callbacks.stop={_target_: test_train_stage.Stop, epoch: 1}"), stopped)
    assert (result(stopped)["status"], result(stopped)["error"]) == ("failed", "interrupted")
    assert checkpoint.read(stopped / "last.ckpt").content["epoch"] == 0
    stages.train(compose_config(*overrides, "resume=true"), stopped)
    a, b = (checkpoint.read(p / "last.ckpt").content for p in (straight, stopped))
    assert equal(a["state_dict"], b["state_dict"])
    for own, other in zip(
        a["optimizer_states"][0]["state"].values(), b["optimizer_states"][0]["state"].values(), strict=True
    ):
        assert all(torch.equal(torch.as_tensor(own[k]), torch.as_tensor(other[k])) for k in own if own[k] is not None)
    timing = ("images_per_s", "time_s")
    histories = [
        [{k: v for k, v in r.items() if k not in timing} for r in result(p)["history"]] for p in (straight, stopped)
    ]
    assert histories[0] == histories[1] and len(histories[0]) == 3
    assert result(straight)["gammas"] == result(stopped)["gammas"]
    assert "resuming after epoch 1 of 3" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("target", [0.4, 0.7])
def test_auto_brings_the_asked_share_of_the_gammas_to_zero(target, tmp_path, capsys):
    from conftest import compose_config

    training = ["data=digits", "model=vgg11", "model.width=0.125", "trainer.max_epochs=20", "trainer.accelerator=cpu"]
    training += ["trainer.enable_progress_bar=false", "data.batch_size=32"]
    stages.train(compose_config(*training, "sparsity=auto", f"target_ratio={target}"), tmp_path)
    assert result(tmp_path)["gammas"]["near_zero_share"] == pytest.approx(target, abs=0.05)
    assert f"so that {target:.0%} of them end below 1% of the largest" in capsys.readouterr().out
    lambdas = [row["sparsity"] for row in result(tmp_path)["history"]]
    assert len(lambdas) == 20 and len(set(lambdas)) > 10


def test_auto_is_for_sgd(small, tmp_path):
    with pytest.raises(ConfigError, match="sparsity=auto is for optimizer=sgd"):
        stages.train(small("sparsity=auto", "target_ratio=0.5", "optimizer=adamw"), tmp_path)


def test_resuming_what_has_not_begun_begins(small, tmp_path, capsys):
    stages.train(small("resume=true"), tmp_path / "run")
    assert "nothing to resume" in capsys.readouterr().out and result(tmp_path / "run")["status"] == "finished"


def test_a_run_is_neither_overwritten_nor_mixed_with_another(small, tmp_path):
    stages.train(small(), tmp_path)
    before = (tmp_path / "result.json").read_bytes()
    with pytest.raises(ConfigError, match="holds a run already"):
        stages.train(small(), tmp_path)
    with pytest.raises(CheckpointError, match=r"another configuration: sparsity was 0\.0001, is 0\.5\. Give"):
        stages.train(small("resume=true", "sparsity=0.5"), tmp_path)
    assert (tmp_path / "result.json").read_bytes() == before


def test_what_does_not_matter_to_the_result_may_change_between_a_run_and_its_resume(small, tmp_path):
    stages.train(small("sparsity=0"), tmp_path / "dense")
    start = f"init_from={tmp_path}/dense/last.ckpt"
    with pytest.raises(SystemExit):
        stages.train(small(start, "+callbacks.stop={_target_: test_train_stage.Stop, epoch: 1}"), tmp_path / "run")
    other = ("trainer.enable_progress_bar=true", "data.eval_batch_size=64", "trainer.profiler=simple")
    stages.train(small("resume=true", *other), tmp_path / "run")
    stages.train(small(start), tmp_path / "straight")
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "straight"))


def test_validation_data_give_a_best_checkpoint(small, tmp_path):
    stages.train(small("data.val_size=100"), tmp_path)
    metrics, history = result(tmp_path)["metrics"], result(tmp_path)["history"]
    assert metrics["val/acc_best"] == max(row["val/acc"] for row in history)
    assert all("test/acc" not in row for row in history) and "test/acc" in metrics
    assert history[metrics["best_epoch"] - 1]["val/acc"] == metrics["val/acc_best"]
    slimming.load(tmp_path / "best.ckpt")


def test_an_epoch_that_was_not_evaluated_has_no_accuracy(small, tmp_path):
    stages.train(small("data.val_size=100", "trainer.check_val_every_n_epoch=2", "trainer.max_epochs=3"), tmp_path)
    assert ["val/acc" in row for row in result(tmp_path)["history"]] == [False, True, False]
    assert "val/acc" not in result(tmp_path)["metrics"] and result(tmp_path)["metrics"]["best_epoch"] == 2


def test_without_any_test_nothing_is_lost(small, tmp_path):
    accuracy = stages.train(small("trainer.limit_test_batches=0", "trainer.limit_val_batches=0"), tmp_path)
    assert (
        math.isnan(accuracy)
        and result(tmp_path)["status"] == "finished"
        and "test/acc" not in result(tmp_path)["metrics"]
    )


def test_only_images_that_were_tested_count(small, tmp_path):
    stages.train(small("trainer.limit_test_batches=2", "data.eval_batch_size=50"), tmp_path)
    accuracy = result(tmp_path)["metrics"]["test/acc"]
    assert result(tmp_path)["n_test"] == 100 and accuracy * 100 == pytest.approx(round(accuracy * 100), abs=1e-4)


def test_a_failure_before_the_network_is_built_is_recorded(small, tmp_path):
    (tmp_path / "last.ckpt").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"last\.ckpt cannot be read"):
        stages.train(small("resume=true"), tmp_path)
    record = result(tmp_path)
    assert record["status"] == "failed" and "last.ckpt cannot be read" in record["error"]


def test_without_validation_data_nothing_is_selected(small, tmp_path):
    stages.train(small(), tmp_path)
    assert not (tmp_path / "best.ckpt").exists() and "val/acc_best" not in result(tmp_path)["metrics"]


def test_starting_from_an_earlier_network(small, tmp_path):
    stages.train(small("sparsity=0"), tmp_path / "dense")
    start = f"init_from={tmp_path}/dense/last.ckpt"
    stages.train(small(start, "optimizer.lr=1e-9", "sparsity=1e-3", "optimizer.weight_decay=0"), tmp_path / "sparse")
    a, b = (slimming.load(tmp_path / name / "last.ckpt") for name in ("dense", "sparse"))
    torch.testing.assert_close(dict(a.named_parameters()), dict(b.named_parameters()), rtol=1e-4, atol=1e-6)
    assert result(tmp_path / "sparse")["parent"] == "../dense/last.ckpt"
    assert (result(tmp_path / "dense")["role"], result(tmp_path / "sparse")["role"]) == ("baseline", "sparse")
    with pytest.raises(CheckpointError, match=r"another architecture \(vgg\(depth=11.*widths=\[4, 'M', 6\]"):
        stages.train(small(start, "model.widths=[4,M,7]"), tmp_path / "other")
    assert result(tmp_path / "other")["status"] == "failed"


def test_a_loss_that_becomes_nan_keeps_the_last_good_epoch(small, tmp_path):
    with pytest.raises(TrainingError, match="loss became NaN or infinite in epoch 2, step 2"):
        stages.train(small("+callbacks.poison._target_=test_train_stage.Poison"), tmp_path)
    assert checkpoint.read(tmp_path / "last.ckpt").content["epoch"] == 0
    assert all(v.isfinite().all() for v in weights(tmp_path).values())
    assert "epoch 2, step 2" in result(tmp_path)["error"]


def test_a_full_disk_keeps_the_last_good_epoch(small, tmp_path, monkeypatch):
    original, calls = torch.save, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        original(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        stages.train(small(), tmp_path)
    assert checkpoint.read(tmp_path / "last.ckpt").content["epoch"] == 0


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["model.widths=[4,N]"], ConfigError, "model.widths"),
        (["model=torchvision", "model.name=resnet17"], ConfigError, "did you mean"),
        (["model=vgg19", "data.image_size=8"], ConfigError, "cannot process images of 1x8x8"),
        (
            ["model=torchvision", "model.name=squeezenet1_0", "data.image_size=32"],
            ConfigError,
            "no BatchNorm with a trainable scale",
        ),
        (["penalty.layers=[layer1.*]"], ConfigError, "penalty.layers"),
        (["data=image_folder"], DataError, "data.root must name a folder"),
        (["data=image_folder", "data.root=nowhere"], DataError, "nowhere/train is not there"),
        (["data.batch_size=0"], ConfigError, "data.batch_size"),
        (["optimizer.lr=fast"], ConfigError, "optimizer"),
        (["optimizer.lr=-1"], ConfigError, "optimizer"),
        (["scheduler.milestones=[80]"], ConfigError, "scheduler.milestones"),
        (["trainer.precision=17"], ConfigError, "trainer: .*17"),
        (["init_from=missing.ckpt"], CheckpointError, "there is no checkpoint missing.ckpt"),
        (["+callbacks.mine._target_=nowhere.Mine"], ConfigError, "callbacks.mine"),
        (["+callbacks.mine.x=1"], ConfigError, "callbacks.mine has no _target_"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_bad_values_fail_before_data_are_loaded(overrides, error, words, tmp_path, monkeypatch):
    from conftest import compose_config

    monkeypatch.setattr(Digits, "load", lambda *a: pytest.fail("data were loaded"))
    drop = {o.split("=")[0].split(".")[0] for o in overrides if o.split("=")[0] in ("model", "data")}
    kept = [o for o in SMALL if o.split("=")[0].split(".")[0] not in drop]
    if "data" not in drop and "model" in drop:
        kept += ["data=digits"] if "data=digits" not in kept else []
    with pytest.raises(error, match=words):
        stages.train(compose_config(*kept, *overrides), tmp_path / "run")
    assert result(tmp_path / "run")["status"] == "failed"
    assert set(os.listdir(tmp_path / "run")) == {"result.json"}


def test_tensorboard_gets_gamma_histograms(small, tmp_path):
    stages.train(small("logger=tensorboard"), tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert "gamma" in events.Tags()["histograms"] and "test/acc" in events.Tags()["scalars"]


@pytest.mark.parametrize("setting", [["compile=false", "channels_last=false"], ["decay_batchnorm=false"]], ids=str)
def test_switches_run(setting, small, tmp_path):
    assert 0 <= stages.train(small(*setting), tmp_path) <= 1


def _key(override: str) -> str:
    return override.partition("=")[0]


def run(*arguments, cwd=ROOT):
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *arguments,
        *[o for o in SMALL if _key(o) not in map(_key, arguments)],
    ]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_sweep_goes_on_past_a_failing_job(tmp_path):
    done = run("-m", "data.batch_size=64,0,32", "sparsity=1e-3", cwd=tmp_path)
    assert done.returncode == 1
    assert "job 1 failed: data.batch_size must be a whole number >= 1, got 0" in done.stderr
    assert "Traceback" not in done.stderr
    states = [json.loads(p.read_text())["status"] for p in sorted(tmp_path.glob("runs/*/*/*/result.json"))]
    assert states == ["finished", "failed", "finished"]
    assert not any("=" in str(p) or "," in str(p) for p in (tmp_path / "runs").rglob("*"))


@pytest.mark.slow
def test_the_command_line_reports_an_error_in_one_line_and_warns_of_nothing(tmp_path):
    done = run("model.widths=[]", f"hydra.run.dir={tmp_path}/bad")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: model.widths must hold at least one convolution, got []" in done.stderr
    done = run("trainer.enable_progress_bar=true", f"hydra.run.dir={tmp_path}/good")
    assert done.returncode == 0 and done.stderr == ""
    assert "test accuracy" in done.stdout and len(done.stdout.splitlines()) < 14


@pytest.mark.slow
def test_a_killed_training_resumes(tmp_path):
    """kill -9 in the middle: at most the current epoch is lost."""
    out = tmp_path / "run"
    long = ["trainer.max_epochs=60", f"hydra.run.dir={out}"]
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *SMALL, *long], stdout=subprocess.PIPE)
    try:
        while not (out / "last.ckpt").exists():
            assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    epoch = checkpoint.read(out / "last.ckpt").content["epoch"]
    assert epoch < 59
    done = run(*long, "resume=true")
    assert done.returncode == 0 and "resuming after epoch" in done.stdout
    assert [r["epoch"] for r in result(out)["history"]] == list(range(1, 61))


def test_a_logger_that_cannot_start_does_not_end_the_training(small, tmp_path, monkeypatch, capsys):
    from lightning.pytorch.loggers import TensorBoardLogger

    def broken(self):
        raise OSError("no space left")

    monkeypatch.setattr(TensorBoardLogger, "experiment", property(broken))
    assert 0 <= stages.train(small("logger=tensorboard"), tmp_path) <= 1
    assert "logger=tensorboard has failed" in capsys.readouterr().err


def test_images_in_folders_whose_mean_is_measured(tmp_path, small):
    for part, name, shade in ((p, n, s) for p in ("train", "test") for n, s in (("dark", 40), ("light", 210))):
        (tmp_path / "images" / part / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (16, 16), (shade, shade + number, shade)).save(
                tmp_path / "images" / part / name / f"{number}.png"
            )
    data = ("data=image_folder", f"data.root={tmp_path / 'images'}", "data.image_size=16", "data.batch_size=3")
    stages.train(small(*data, "data.crop=0", "trainer.max_epochs=1"), tmp_path / "run")
    record = checkpoint.read(tmp_path / "run" / "last.ckpt").record
    assert record.io_shape == {"num_classes": 2, "in_channels": 3}
    assert record.data["mean"] == pytest.approx([125 / 255, 126 / 255, 125 / 255], abs=0.01)
