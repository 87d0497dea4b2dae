"""Penalties on the command line: what a training says and records of them, and what a fine-tuning takes over."""

import json

import pytest

from conftest import SMALL, compose_config
from slimming import checkpoint, stages
from slimming.channels.options import PENALTY_NAMES, PenaltyOptions
from slimming.errors import ConfigError, RunDirectoryError
from slimming.report.collect import collect
from slimming.report.words import setting
from slimming.stages.finetuning import penalty_of


def result(out):
    return json.loads((out / "result.json").read_text())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["penalty=l1"], ["10 gammas in 2 BatchNorms are penalised, lambda 0.01", "alone can move a gamma by 0.044;"]),
        (
            ["penalty=proximal", "optimizer=adamw", "optimizer.lr=0.1"],
            ["are penalised by a soft threshold after every step, lambda 0.01", "alone can move a gamma by 0.0044;"],
        ),
        (
            ["penalty=polarization", "penalty.t=1.2", "model.gamma_init=1.5"],
            [
                "by polarization, t 1.2, and clamped to [0, 1] (10 lie outside now)",
                "move a gamma by at most 0.141; they start at 1 (median)",
            ],
        ),
        (
            ["penalty=group", "model=preresnet20", "model.width=0.25"],
            ["groups, 112 of them of several gammas, lambda 0.01", "the root mean square of a group by 0.044;"],
        ),
    ],
    ids=PENALTY_NAMES,
)
def test_a_training_says_and_records_its_penalty(overrides, words, tmp_path, capsys):
    kept = [o for o in SMALL if not (o.startswith("model") and "model=preresnet20" in overrides)]
    stages.train(compose_config(*kept, "sparsity=0.01", *overrides), tmp_path / "run")
    text = capsys.readouterr().out
    assert all(word in text for word in words), text
    penalty = compose_config(*overrides).penalty
    assert result(tmp_path / "run")["config"]["penalty"] == {"name": penalty.name, "layers": None, "t": penalty.t}
    (run,) = collect(tmp_path).runs
    named = {"l1": "", "polarization": "polarization t 1.2, "}.get(penalty.name, f"{penalty.name}, ")
    assert setting(run) == f"{named}lambda 0.01, 2 epochs"
    weights = checkpoint.read(tmp_path / "run" / "last.ckpt").content["state_dict"]
    if penalty.name == "polarization":
        assert 0.9 < float(weights["model.feature.1.weight"].max()) <= 1  # it began at 1.5


def test_a_strong_proximal_training_ends_with_exact_zeros(small, tmp_path):
    stages.train(small("penalty=proximal", "sparsity=2"), tmp_path)
    saved = checkpoint.read(tmp_path / "last.ckpt").content["state_dict"]
    assert not saved["model.feature.1.weight"].any()


@pytest.mark.parametrize("penalty", PENALTY_NAMES)
def test_a_network_without_batchnorm_is_an_error_for_all(penalty, tmp_path):
    kept = [o for o in SMALL if not o.startswith("model")]
    network = ("model=torchvision", "model.name=squeezenet1_0", "data.image_size=32")
    cfg = compose_config(*kept, *network, f"penalty={penalty}")
    with pytest.raises(ConfigError, match="no BatchNorm with a trainable scale"):
        stages.train(cfg, tmp_path)


def test_another_penalty_is_another_run(small, tmp_path):
    stages.train(small("penalty.layers=[feature.*]"), tmp_path)
    (tmp_path / "result.json").unlink()
    with pytest.raises(RunDirectoryError, match=r"penalty\.name was l1, is proximal"):
        stages.train(small("penalty.layers=[feature.*]", "penalty=proximal", "resume=true"), tmp_path)


RECORDED = {"name": "polarization", "layers": ["layer1.*"], "t": 1.5}
LAYERS = {"layers": ["layer1.*"]}  # of versions that had no other penalty


@pytest.mark.parametrize(
    ("overrides", "recorded", "expected"),
    [
        ([], RECORDED, PenaltyOptions()),  # without sparsity
        (["sparsity=0.1"], RECORDED, PenaltyOptions("polarization", ["layer1.*"], 1.5)),
        (["sparsity=0.1", "penalty.t=0.5"], RECORDED, PenaltyOptions("polarization", ["layer1.*"], 0.5)),
        (["sparsity=0.1", "penalty.layers=['*']"], RECORDED, PenaltyOptions("polarization", ["*"], 1.5)),
        (["sparsity=0.1", "penalty=proximal"], RECORDED, PenaltyOptions("proximal")),
        (["sparsity=0.1", "penalty=polarization"], RECORDED, PenaltyOptions("polarization", None, 1.0)),
        (["sparsity=0.1"], LAYERS, PenaltyOptions("l1", ["layer1.*"])),
        (["sparsity=0.1"], {"layers": None}, PenaltyOptions()),
        (["sparsity=0.1", "penalty=group"], LAYERS, PenaltyOptions("group")),
        (["sparsity=0.1"], None, PenaltyOptions()),
        (["sparsity=0.1"], "odd", PenaltyOptions()),
        (["sparsity=0.1"], {"name": "later", "more": 1}, "penalty.name must be one of"),
        (["sparsity=0.1"], {"name": "l1", "t": 1}, "penalty.t=1 is of penalty=polarization"),
        (["sparsity=0.1"], {"layers": [1]}, "penalty.layers must be a list of shell patterns"),
        (["penalty.t=1"], RECORDED, "penalty.t=1 is of penalty=polarization"),
    ],
    ids=str,
)
def test_a_fine_tuning_takes_over_the_recorded_penalty(overrides, recorded, expected):
    cfg = compose_config("checkpoint=a.ckpt", *overrides, name="finetune")
    if isinstance(expected, PenaltyOptions):
        assert penalty_of(cfg, recorded) == expected
    else:
        with pytest.raises(ConfigError, match=expected):
            penalty_of(cfg, recorded)


def test_the_second_pass_of_slim_has_the_penalty_of_the_first(small, tmp_path):
    overrides = (*SMALL, "trainer.max_epochs=1", "penalty=polarization", "sparsity=0.01", "passes=2", "latency_batch=0")
    stages.slim(compose_config(*overrides, "ratio=0.2", "calibrate.batches=1", name="slim"), tmp_path)
    for folder in ("sparse", "pass-2/sparse"):
        config = result(tmp_path / folder)["config"]
        assert config["sparsity"] == 0.01
        assert config["penalty"] == {"name": "polarization", "layers": None, "t": 1.0}
    tuned = result(tmp_path / "ratio-0.2" / "finetuned")["config"]
    assert (tuned["sparsity"], tuned["penalty"]["name"]) == (0, "l1")
