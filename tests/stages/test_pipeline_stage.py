"""slim: the stages in turn, kept when finished, gone on with when interrupted."""

import json
import os
import shutil

import pytest
import torch

import slimming
from conftest import SMALL, compose_config
from slimming import checkpoint, stages
from slimming.errors import CheckpointError, ConfigError

QUICK = (
    "model.widths=[8,M,12]",
    "sparsity=0.01",
    "latency_batch=0",
    "calibrate.batches=2",
    "trainer.limit_test_batches=1",
)
SETTING = tuple(o for o in SMALL if not o.startswith("model.widths")) + QUICK


def slim(out, *overrides):
    return stages.slim(compose_config(*SETTING, *overrides, name="slim"), out)


def result(out):
    return json.loads((out / "result.json").read_text())


def state(path):
    return checkpoint.read(path).content["state_dict"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def folders(out):
    return {str(p.parent.relative_to(out)) for p in out.rglob("result.json")}


def times(out):
    return {str(p): p.stat().st_mtime_ns for p in out.rglob("*.ckpt")}


def test_the_stages_one_by_one_give_the_same(tmp_path):
    tuning = ("finetune.max_epochs=1", "finetune.lr=0.02", "finetune.scratch=true", "finetune.distill=true")
    accuracy = slim(tmp_path / "slim", "ratio=0.5", "baseline=true", "min_channels=2", *tuning)
    out = tmp_path / "slim"
    names = {"pruned", "finetuned", "scratch"}
    assert folders(out) == {"baseline", "sparse"} | {f"ratio-0.5/{n}" for n in names}
    assert (out / "report.html").exists() and result(out / "baseline")["role"] == "baseline"
    assert accuracy == result(out / "ratio-0.5/finetuned")["metrics"]["test/acc"]
    train = (*[o for o in SETTING if not o.startswith(("latency", "calibrate"))],)
    stages.train(compose_config(*train), tmp_path / "sparse")
    options = ("ratio=0.5", "min_channels=2", "latency_batch=0", "calibrate.batches=2", "trainer.limit_test_batches=1")
    path = f"checkpoint={tmp_path}/sparse/last.ckpt"
    stages.prune(compose_config(path, *options, name="prune"), tmp_path / "pruned")
    path = f"checkpoint={tmp_path}/pruned/pruned.ckpt"
    tune = ("trainer.max_epochs=1", "optimizer.lr=0.02", f"distill.teacher={tmp_path}/sparse/last.ckpt")
    stages.finetune(compose_config(path, *tune, name="finetune"), tmp_path / "finetuned")
    for ours, theirs in (
        ("sparse/last.ckpt", "sparse/last.ckpt"),
        ("ratio-0.5/pruned/pruned.ckpt", "pruned/pruned.ckpt"),
        ("ratio-0.5/finetuned/last.ckpt", "finetuned/last.ckpt"),
    ):
        assert same(state(out / ours), state(tmp_path / theirs)), ours
    assert len(result(out / "ratio-0.5/scratch")["history"]) == 2
    assert all(result(out / f"ratio-0.5/{name}")["config"]["shrink"] is None for name in ("finetuned", "scratch"))


def test_what_is_finished_is_kept_and_more_ratios_are_added(tmp_path, capsys):
    slim(tmp_path, "ratio=[0.3,0.5]")
    before = times(tmp_path)
    slim(tmp_path, "ratio=[0.3,0.5,0.6]")
    after = times(tmp_path)
    assert {k: after[k] for k in before} == before and len(after) == len(before) + 2
    assert capsys.readouterr().out.count("finished already, kept") == 5
    words = r"sparse holds a finished run of another configuration: sparsity was 0\.01, is 0\.02"
    with pytest.raises(CheckpointError, match=words):
        slim(tmp_path, "ratio=0.5", "sparsity=0.02")
    with pytest.raises(CheckpointError, match=r"pruned holds .* round_to was 1, is 4"):
        slim(tmp_path, "ratio=0.5", "round_to=4")
    with pytest.raises(CheckpointError, match=r"finetuned holds .*optimizer\.lr was 0\.1, is 0\.5"):
        slim(tmp_path, "ratio=0.5", "finetune.lr=0.5")
    assert times(tmp_path) == after
    assert all(result(tmp_path / f)["status"] == "finished" for f in folders(tmp_path))


@pytest.mark.parametrize("where", ["sparse", "finetuned"])
def test_interrupted_and_started_again_equals_uninterrupted(where, tmp_path):
    slim(tmp_path / "a", "ratio=0.5", "trainer.max_epochs=3")
    stop = "+callbacks.stop={_target_: test_train_stage.Stop, epoch: 1}"
    if where == "finetuned":
        slim(tmp_path / "b", "ratio=0.5", "trainer.max_epochs=3")
        shutil.rmtree(tmp_path / "b/ratio-0.5/finetuned")
    with pytest.raises(SystemExit):
        slim(tmp_path / "b", "ratio=0.5", "trainer.max_epochs=3", stop)
    slim(tmp_path / "b", "ratio=0.5", "trainer.max_epochs=3")
    for name in ("sparse/last.ckpt", "ratio-0.5/finetuned/last.ckpt"):
        assert same(state(tmp_path / "a" / name), state(tmp_path / "b" / name))


def test_an_interrupted_pruning_is_done_again(tmp_path):
    slim(tmp_path, "ratio=0.5")
    before = state(tmp_path / "ratio-0.5/pruned/pruned.ckpt")
    os.remove(tmp_path / "ratio-0.5/pruned/result.json")
    slim(tmp_path, "ratio=0.5")
    assert same(before, state(tmp_path / "ratio-0.5/pruned/pruned.ckpt"))


def test_several_passes(tmp_path):
    slim(tmp_path, "ratio=0.3", "trainer.max_epochs=1")
    kept = times(tmp_path)
    slim(tmp_path, "ratio=0.3", "trainer.max_epochs=1", "passes=3")
    assert {k: v for k, v in times(tmp_path).items() if k in kept} == kept
    last = tmp_path / "pass-3" / "ratio-0.3"
    plans = checkpoint.read(last / "finetuned/last.ckpt").content["slimming"]["plans"]
    assert len(plans) == 3
    costs = [result(tmp_path / p / "ratio-0.3/pruned")["cost"]["num_params"] for p in ("", "pass-2", "pass-3")]
    assert costs[0] > costs[1] > costs[2]
    again = result(tmp_path / "pass-2/sparse")
    assert (again["role"], again["config"]["sparsity"]) == ("sparse", 0.01)
    text = (tmp_path / "report.md").read_text()
    table = text.split("### passes")[1].split("##")[0]
    assert [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")] == [
        "pass",
        "1",
        "2",
        "3",
    ]
    shutil.move(last, tmp_path / "alone")
    for name in ("sparse", "ratio-0.3", "pass-2", "pass-3"):
        shutil.rmtree(tmp_path / name)
    slimming.load(tmp_path / "alone/finetuned/last.ckpt")(torch.zeros(1, 1, 8, 8))


class OwnSGD(torch.optim.SGD):
    """An optimizer that no checkpoint may name."""


def own_network(width: int = 6, num_classes: int = 10, in_channels: int = 1):
    layers = [torch.nn.Conv2d(in_channels, width, 3, bias=False), torch.nn.BatchNorm2d(width), torch.nn.ReLU()]
    return torch.nn.Sequential(
        *layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(width, num_classes)
    )


def test_classes_of_ones_own_go_through_all_stages(tmp_path):
    setting = [o for o in SETTING if not o.startswith("model")]
    cfg = compose_config(
        *setting, "ratio=0.5", "passes=2", "trainer.max_epochs=1", "finetune.distill=true", name="slim"
    )
    cfg.model = {"_target_": "test_pipeline_stage.own_network", "width": 8}
    cfg.optimizer |= {"_target_": "test_pipeline_stage.OwnSGD"}
    assert 0 <= stages.slim(cfg, tmp_path) <= 1
    thin = slimming.load(tmp_path / "pass-2/ratio-0.5/finetuned/last.ckpt", model=own_network(8))
    assert thin[1].num_features == 2


def test_a_strategy_of_ones_own_goes_through_all_stages(tmp_path):
    cfg = compose_config(*SETTING, "ratio=0.5", "trainer.max_epochs=1", name="slim")
    cfg.trainer |= {"strategy": {"_target_": "lightning.pytorch.strategies.SingleDeviceStrategy", "device": "cpu"}}
    assert 0 <= stages.slim(cfg, tmp_path) <= 1
    assert result(tmp_path / "ratio-0.5/finetuned")["config"]["trainer"]["strategy"]["device"] == "cpu"


def test_a_moved_folder_goes_on(tmp_path):
    slim(tmp_path / "a", "ratio=0.5", "trainer.max_epochs=1", "finetune.distill=true")
    (tmp_path / "a").rename(tmp_path / "b")
    before = times(tmp_path / "b")
    slim(tmp_path / "b", "ratio=0.5", "trainer.max_epochs=1", "finetune.distill=true")
    assert times(tmp_path / "b") == before


@pytest.mark.parametrize("overrides", [["budget.macs=0.6"], ["criterion=optimal", "delta=0.1"], ["threshold=0.1"]])
def test_other_criteria(overrides, tmp_path):
    slim(tmp_path, *overrides, "trainer.max_epochs=1")
    assert len(folders(tmp_path)) == 3


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["ratio=0.5", "passes=0"], "passes must be a whole number >= 1, got 0"),
        (["ratio=1.2"], r"ratio must be a number >= 0 and < 1"),
        (["ratio=[0.5,1.2]"], r"ratio must be a number >= 0 and < 1"),
        (["ratio=high"], "ratio must be a number"),
        (["ratio=[]"], "is empty"),
        (["ratio=[0.5,0.5]"], "names a share twice"),
        (["ratio=[0.4,0.5]", "passes=2"], "several passes take one ratio"),
        (["ratio=0.5", "passes=2", "sparsity=0"], "needs sparsity > 0"),
        (["ratio=0.5", "resume=true"], "goes on by itself"),
        (["ratio=0.5", "finetune.max_epochs=0"], "finetune.max_epochs"),
        (["ratio=0.5", "finetune.lr=-1"], "finetune.lr"),
        (["ratio=0.5", "threshold=1"], "exactly one criterion"),
        (["ratio=0.5", "ties=appart"], "ties must be one of together, apart"),
    ],
    ids=str,
)
def test_bad_values(overrides, words):
    with pytest.raises(ConfigError, match=words):
        compose_config(*SETTING, *overrides, name="slim")


def test_without_a_criterion_half_goes():
    assert compose_config(*SETTING, name="slim").ratio == 0.5
    assert compose_config(*SETTING, "budget.macs=0.4", name="slim").ratio is None


def test_the_demo_is_a_pipeline():
    cfg = compose_config("experiment=demo", name="slim")
    assert (cfg.ratio, cfg.model["width"], cfg.data["_target_"]) == (0.7, 0.25, "slimming.data.Digits")


def test_every_stage_reaches_the_logger_in_one_group(tmp_path):
    from mlflow.tracking import MlflowClient

    (tmp_path / "run" / ".hydra").mkdir(parents=True)  # as Hydra leaves one
    slim(tmp_path / "run", "ratio=0.5", "logger=mlflow", f"logger.mlflow.tracking_uri=file:{tmp_path}/mlruns")
    client = MlflowClient(f"file:{tmp_path}/mlruns")
    (experiment,) = [e for e in client.search_experiments() if e.name == "slimming"]
    runs = client.search_runs([experiment.experiment_id])
    stages_of = sorted((run.data.tags["stage"], run.data.tags["group"], run.info.status) for run in runs)
    group = f"{tmp_path.name}_run"
    assert stages_of == [(stage, group, "FINISHED") for stage in ("finetune", "prune", "train")]
    for run in runs:
        files = {f.path for f in client.list_artifacts(run.info.run_id)}
        assert {"result.json", "gammas.png"} <= files and "final/test/acc" in run.data.metrics


@pytest.mark.parametrize("stage", ["train", "slim"])
def test_a_logger_that_is_not_installed_is_recorded_as_the_cause(stage, tmp_path, monkeypatch):
    from slimming.training import tracking

    monkeypatch.setattr(tracking, "_installed", lambda package: False)
    setting = SETTING if stage == "slim" else SMALL
    with pytest.raises(ConfigError, match=r"pip install 'slimming\[wandb\]'"):
        getattr(stages, stage)(compose_config(*setting, "logger=wandb", name=stage), tmp_path / "run")
    out = tmp_path / "run" / ("sparse" if stage == "slim" else ".")
    assert "pip install" in result(out)["error"] and not (out / "last.ckpt").exists()


def test_a_pattern_that_matches_nothing_is_refused_before_the_training(tmp_path):
    with pytest.raises(ConfigError, match=r"ignore: 'featur\.\*' matches no BatchNorm; there are feature\.1"):
        slim(tmp_path / "run", "ratio=0.5", "ignore=[featur.*]")
    assert not (tmp_path / "run").exists()
