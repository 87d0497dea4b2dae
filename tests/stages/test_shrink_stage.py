"""`shrink=true`: channels leave while the network trains, and nothing else changes."""

import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from test_train_stage import equal, result
from torch import nn

import slimming
from conftest import compose_config
from slimming import checkpoint, stages
from slimming.errors import ConfigError, SlimmingError
from slimming.training import shrinking

SMALL = ("data=digits", "data.image_size=8", "data.crop=1", "trainer.accelerator=cpu", "trainer.max_epochs=5")
SMALL += ("trainer.enable_progress_bar=false", "trainer.limit_train_batches=6")
HERE = Path(__file__).parent
SHRINK = ("shrink.epochs=1", "shrink.round_to=1")
VGG = ("model=vgg11", "model.widths=[4,M,6]")


class Fades(Callback):
    """By the end of every epoch, the first gamma of each BatchNorm is zero; its beta is not."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d) and trainer.is_last_batch):
            norm.weight.data[0] = 0.0


class Dies(Callback):
    def __init__(self, epoch: int):
        self.epoch = epoch

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.current_epoch == self.epoch:
            raise SlimmingError("the first cause")


FADES = "+callbacks.fades._target_=test_shrink_stage.Fades"


def train(out, *overrides):
    return stages.train(compose_config(*SMALL, FADES, *overrides), out)


def gone(out) -> list[int]:
    return [s["removed"] + s["dead"] for s in result(out)["shrinks"]]


def test_channels_leave_and_the_record_tells(tmp_path, capsys):
    accuracy = train(tmp_path, *VGG, *SHRINK)
    record = result(tmp_path)
    # The first layer keeps its last channel; that one is no reason to try again. After the last epoch nothing leaves.
    assert gone(tmp_path) == [2, 2, 2, 1] and record["widths"] == [1, "M", 2]
    assert [s["epoch"] for s in record["shrinks"]] == [1, 2, 3, 4]
    thin = slimming.load(tmp_path / "last.ckpt")
    dense = slimming.models.build("vgg", depth=11, widths=[4, "M", 6], num_classes=10, in_channels=1)
    for network, cost in ((thin, record["cost"]), (dense, record["cost_before"])):
        assert sum(p.numel() for p in network.parameters()) == cost["num_params"]
    assert [row["gammas_left"] for row in record["history"]] == [10, 8, 6, 4, 3]
    for share in ("params", "macs"):
        key = {"params": "num_params"}.get(share, share)
        assert record["shrinks"][-1][share] == pytest.approx(record["cost"][key] / record["cost_before"][key])
    # The share and the picture count the gammas that the training began with; those that have left are zeros.
    assert [sum(counts) for counts in record["gammas"]["counts"]] == [10] * 6
    assert record["gammas"]["near_zero_share"] == pytest.approx(0.9)
    assert record["metrics"]["test/acc"] == accuracy
    assert f"left the network: {record['cost']['num_params']:,} parameters" in capsys.readouterr().out


SETTINGS = {
    "sgd": (*VGG, *SHRINK, "data.val_size=0.2"),
    "two epochs": (*VGG, "shrink.epochs=2", "shrink.round_to=1", "trainer.max_epochs=6", "decay_batchnorm=false"),
    "adamw": (*VGG, *SHRINK, "optimizer=adamw", "scheduler=cosine"),
    "auto": (*VGG, *SHRINK, "sparsity=auto", "target_ratio=0.5"),
    "polarization": (*VGG, *SHRINK, "penalty=polarization", "penalty.t=1"),
    "residual": (
        *("model=preresnet20", "model.width=0.25", "sparsity=0.01", "penalty=group", *SHRINK),
        *("trainer.accumulate_grad_batches=3", "trainer.precision=bf16-mixed"),
    ),
}


WHERE = ("within an epoch", "before the file is rewritten", "after it")
CASES = [("sgd", where) for where in WHERE] + [(name, WHERE[i % 3]) for i, name in enumerate([*SETTINGS][1:])]


@pytest.mark.parametrize(("setting", "where"), CASES)
def test_resumed_equals_uninterrupted(setting, where, tmp_path, monkeypatch):
    overrides = SETTINGS[setting]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(straight, *overrides)
    assert gone(straight)
    if where == "within an epoch":
        with pytest.raises(SystemExit):
            train(stopped, *overrides, "+callbacks.stop={_target_: test_train_stage.Stop, epoch: 3}")
    else:
        original = shrinking.Leaving.let_go

        def interrupted(*args):
            if where == "after it":
                original(*args)
            raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(shrinking.Leaving, "let_go", interrupted)
            train(stopped, *overrides)
    assert result(stopped)["status"] == "failed"
    train(stopped, *overrides, "resume=true")
    a, b = (checkpoint.read(p / "last.ckpt").content for p in (straight, stopped))
    assert equal(a["state_dict"], b["state_dict"])
    assert a["slimming"]["plans"] == b["slimming"]["plans"] and a["slimming"]["metrics"] == b["slimming"]["metrics"]
    states = [c["optimizer_states"][0]["state"].values() for c in (a, b)]
    for own, other in zip(*states, strict=True):
        assert all(torch.equal(torch.as_tensor(own[k]), torch.as_tensor(other[k])) for k in own if own[k] is not None)
    timing = ("images_per_s", "time_s")
    histories = [
        [{k: v for k, v in r.items() if k not in timing} for r in result(p)["history"]] for p in (straight, stopped)
    ]
    assert histories[0] == histories[1] and len(histories[0]) >= 5
    for key in ("gammas", "shrinks", "widths", "cost"):
        assert result(straight)[key] == result(stopped)[key]


def test_a_checkpoint_of_the_best_epoch_has_the_width_of_that_epoch(tmp_path):
    train(tmp_path, *VGG, *SHRINK, "data.val_size=0.2")
    best = result(tmp_path)["metrics"]["best_epoch"]
    plans = checkpoint.read(tmp_path / "best.ckpt").record.plans
    assert len(plans) == sum(s["epoch"] < best for s in result(tmp_path)["shrinks"])
    slimming.load(tmp_path / "best.ckpt")


def prune(out, *overrides):
    common = (f"checkpoint={out}/last.ckpt", "latency_batch=0", "calibrate.batches=2")
    return stages.prune(compose_config(*common, *overrides, name="prune"), out.parent / folder(*overrides))


def folder(*overrides) -> str:
    return "_".join(overrides).replace("=", "-")


@pytest.fixture(scope="module")
def shrunk(tmp_path_factory):
    """A training of 10 gammas that 4 have left."""
    out = tmp_path_factory.mktemp("shrunk") / "run"
    train(out, *VGG, *SHRINK, "trainer.max_epochs=3")
    assert sum(gone(out)) == 4
    return out


@pytest.mark.parametrize("ties", ["together", "apart"])
@pytest.mark.parametrize(("ratio", "removed"), [(0.7, 7), (0.4, 4), (0.2, 4), (0.0, 4)])
def test_a_ratio_counts_the_channels_that_the_training_began_with(shrunk, ratio, removed, ties):
    prune(shrunk, f"ratio={ratio}", f"ties={ties}")
    out = shrunk.parent / folder(f"ratio={ratio}", f"ties={ties}")
    record, sparse = result(out), result(shrunk)
    assert (record["plan"]["removed"], record["plan"]["candidates"]) == (removed, 10)
    assert record["ratio"] == {"asked": ratio or None or 0.0, "got": removed / 10}
    assert record["cost_before"] == sparse["cost_before"] and record["widths_before"] == [4, "M", 6]
    assert record["metrics"]["test/acc_before"] == pytest.approx(sparse["metrics"]["test/acc"], abs=1e-6)
    thin = slimming.load(out / "pruned.ckpt")
    assert sum(p.numel() for p in thin.parameters()) == record["cost"]["num_params"]
    assert len(checkpoint.read(out / "pruned.ckpt").record.plans) == 1
    if removed == 4:
        assert record["cost"] == sparse["cost"]
        assert record["metrics"]["test/acc_pruned"] == pytest.approx(sparse["metrics"]["test/acc"], abs=1e-6)


@pytest.mark.parametrize(
    "criterion",
    [
        ("budget.macs=0.5",),
        ("threshold=0",),
        ("criterion=optimal",),
        ("criterion=per_layer", "ratio=0.5"),
        ("ratio=0.5", "score=weight_l1"),
        ("ratio=0.5", "score=random"),
        ("ratio=0.5", "score=lamp", "per=macs"),
        ("ratio=0.5", "score=reconstruction", "repair=true"),
    ],
    ids="-".join,
)
def test_what_has_left_stays_away_whatever_the_criterion(shrunk, criterion):
    prune(shrunk, *criterion)
    record = result(shrunk.parent / folder(*criterion))
    assert all(now <= then for now, then in zip(record["widths"], result(shrunk)["widths"], strict=True) if now != "M")
    if "ratio=0.5" in criterion and "criterion=per_layer" not in criterion:
        assert record["plan"]["removed"] == 5
    asked = [c.partition("=")[2] for c in criterion if c.startswith("score=")]
    assert [record["criterion"]["score"]] == asked if asked else "score" not in record["criterion"]
    if criterion[0].startswith("budget"):
        assert record["cost"]["macs"] <= 0.5 * record["cost_before"]["macs"]


def test_a_shrunk_network_is_trained_further(shrunk, tmp_path):
    prune(shrunk, "ratio=0.5")
    pruned = shrunk.parent / "ratio-0.5/pruned.ckpt"
    common = ("trainer.max_epochs=3", FADES, "sparsity=0.01", *SHRINK)
    stages.finetune(compose_config(f"checkpoint={pruned}", *common, name="finetune"), tmp_path / "again")
    assert gone(tmp_path / "again") == [1, 1]  # the first layer has one channel left
    stages.finetune(compose_config(f"checkpoint={shrunk}/last.ckpt", name="finetune"), tmp_path / "as it is")
    assert result(tmp_path / "as it is")["cost"] == result(shrunk)["cost"]
    with pytest.raises(ConfigError, match="optimizer_state=true: channels left while"):
        stages.finetune(
            compose_config(f"checkpoint={pruned}", "optimizer_state=true", name="finetune"), tmp_path / "state"
        )


@pytest.mark.slow
def test_the_pipeline_shrinks_in_every_pass(tmp_path):
    quick = ("latency_batch=0", "calibrate.batches=2", "ratio=0.5", "sparsity=0.01", "finetune.max_epochs=1")
    passes = ("passes=2", "baseline=true", *SHRINK, "trainer.max_epochs=3")
    stages.slim(compose_config(*SMALL, *VGG, FADES, *quick, *passes, name="slim"), tmp_path)
    assert "shrinks" not in result(tmp_path / "baseline")
    assert gone(tmp_path / "sparse") and gone(tmp_path / "pass-2/sparse")
    first, second = (result(tmp_path / name / "ratio-0.5/pruned") for name in (".", "pass-2"))
    assert first["widths_before"] == [4, "M", 6] and second["widths_before"] == first["widths"]
    page = (tmp_path / "report.md").read_text()
    assert "shrinking" in page
    wide = first["cost_before"]["num_params"]
    assert f"{first['cost']['num_params']:,} ({first['cost']['num_params'] / wide - 1:+.1%})" in page


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["shrink=true", "sparsity=0"], "shrink=true needs a penalty"),
        (["shrink=yes please"], "shrink must be true, false, or shrink.epochs"),
        (["shrink.epochs=-1"], "shrink.epochs must be a whole number >= 0"),
        (["shrink.epochs=1", "shrink.threshold=1"], "shrink.threshold must be a number > 0 and < 1"),
        (["shrink.epochs=1", "shrink.threshold=0"], "shrink.threshold must be a number > 0 and < 1"),
        (["shrink.epochs=1", "shrink.round_to=0"], "shrink.round_to must be a whole number >= 1"),
        (["shrink.threshold=0.1"], "shrink.threshold and shrink.round_to need shrink.epochs=2 beside them"),
        (["shrink=true", "+trainer.min_epochs=3"], "shrink=true and trainer.min_epochs exclude each other"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_values_that_do_not_fit_are_named(overrides, words):
    with pytest.raises(ConfigError, match=words):
        compose_config(*SMALL, *overrides)


def test_the_pipeline_does_not_let_layers_leave_that_are_to_stay():
    with pytest.raises(ConfigError, match="shrink=true and ignore="):
        compose_config("shrink=true", "ignore=[feature.1]", name="slim")


def test_averaged_weights_would_stay_wide(tmp_path):
    average = "+callbacks.average={_target_: lightning.pytorch.callbacks.StochasticWeightAveraging, swa_lrs: 0.1}"
    with pytest.raises(ConfigError, match="shrink=true and the callback StochasticWeightAveraging exclude each other"):
        train(tmp_path, *VGG, "shrink=true", average)


def test_off_is_off(tmp_path):
    for name, override in (("default", "seed=1"), ("off", "shrink=false")):
        train(tmp_path / name, *VGG, override)
        assert "shrinks" not in result(tmp_path / name)
    a, b = (checkpoint.read(tmp_path / name / "last.ckpt") for name in ("default", "off"))
    assert equal(a.content["state_dict"], b.content["state_dict"]) and a.record.config == b.record.config
    assert "Shrinking" not in a.content["callbacks"]


@pytest.mark.slow
@pytest.mark.parametrize("interrupted", [False, True])
def test_two_processes_equal_one(interrupted, tmp_path, monkeypatch):
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([*map(str, (HERE, HERE.parent)), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    setting = (*SMALL, *VGG, FADES, "trainer.precision=64-true", "data.augment=false", "sparsity=0.01")
    setting = (*setting, *SHRINK, "+callbacks.f._target_=test_devices.Frozen")
    one, two = tmp_path / "one", tmp_path / "two"
    stages.run_on_devices("train", compose_config(*setting), one)
    two_devices = (*setting, "trainer.devices=2")
    if interrupted:
        dies = "+callbacks.d={_target_: test_shrink_stage.Dies, epoch: 3}"
        with pytest.raises(SlimmingError, match="the first cause"):
            stages.run_on_devices("train", compose_config(*two_devices, dies), two)
        assert len(checkpoint.read(two / "last.ckpt").record.plans) == 3
        two_devices = (*two_devices, "resume=true")
    stages.run_on_devices("train", compose_config(*two_devices), two)
    assert gone(one) == gone(two) == [2, 2, 2, 1]
    alone, first, second = (torch.load(p, weights_only=True) for p in (one / "rank0.pt", *two.glob("rank?.pt")))
    for key in alone:
        torch.testing.assert_close(first[key], alone[key], rtol=1e-11, atol=1e-12)
        assert torch.equal(first[key], second[key]), key
    for a, b in zip(result(one)["history"], result(two)["history"], strict=True):
        for key in ("train/loss", "train/penalty", "train/acc", "test/acc", "gammas_left"):
            assert b[key] == pytest.approx(a[key], rel=1e-5), key
