"""`shrink=true`: channels leave while the network trains, and nothing else changes."""

import pytest
import torch
from lightning.pytorch import Callback
from test_train_stage import equal, result
from torch import nn

import slimming
from conftest import compose_config
from slimming import checkpoint, stages
from slimming.training import shrinking

SMALL = ("data=digits", "data.image_size=8", "data.crop=1", "trainer.accelerator=cpu", "trainer.max_epochs=5")
SMALL += ("trainer.enable_progress_bar=false", "trainer.limit_train_batches=6")
VGG = ("model=vgg11", "model.widths=[4,M,6]")


class Fades(Callback):
    """By the end of every epoch, the first gamma of each BatchNorm is zero; its beta is not."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d) and trainer.is_last_batch):
            norm.weight.data[0] = 0.0


FADES = "+callbacks.fades._target_=test_shrink_stage.Fades"


def train(out, *overrides):
    return stages.train(compose_config(*SMALL, FADES, *overrides), out)


def gone(out) -> list[int]:
    return [s["removed"] + s["dead"] for s in result(out)["shrinks"]]


def test_channels_leave_and_the_record_tells(tmp_path, capsys):
    accuracy = train(tmp_path, *VGG, "shrink.epochs=1")
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
    "sgd": (*VGG, "shrink.epochs=1", "data.val_size=0.2"),
    "two epochs": (*VGG, "shrink=true", "trainer.max_epochs=6", "decay_batchnorm=false"),
    "adamw": (*VGG, "shrink.epochs=1", "optimizer=adamw", "scheduler=cosine"),
    "auto": (*VGG, "shrink.epochs=1", "sparsity=auto", "target_ratio=0.5"),
    "polarization": (*VGG, "shrink.epochs=1", "penalty=polarization", "penalty.t=1"),
    "residual": (
        *("model=preresnet20", "model.width=0.25", "sparsity=0.01", "penalty=group", "shrink.epochs=1"),
        *("trainer.accumulate_grad_batches=3", "trainer.precision=bf16-mixed"),
    ),
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("where", ["within an epoch", "before the file is rewritten", "after it"])
def test_resumed_equals_uninterrupted(setting, where, tmp_path, monkeypatch):
    overrides = setting
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
