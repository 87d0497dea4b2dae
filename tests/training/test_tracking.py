"""What arrives at TensorBoard, Weights & Biases and MLflow, without any network, and what their failures may not do."""

import json
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from reference import Net

from conftest import ROOT, compose_config
from slimming.data import Digits
from slimming.errors import ConfigError
from slimming.stages.building import build
from slimming.training.module import SlimmingModule
from slimming.training.recorder import Recorder
from slimming.training.tracking import IDS, Tracking, final_metrics, group_of

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG = {"sparsity": 0.05, "model": {"name": "net"}}
METRICS = {"test/loss", "test/acc", "train/loss", "train/acc", "train/penalty", "gamma_near_zero", "lr", "images_per_s"}
FINAL = {"final/test/acc": 0.5, "final/num_params": 100.0, "final/macs": 2000.0}


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("MLFLOW_DISABLE_TELEMETRY", "true")):
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)


class Broken(CSVLogger):
    """A server that is gone after some calls."""

    calls = 0

    def log_metrics(self, metrics, step=None):
        type(self).calls += 1
        if self.calls > 2:
            raise ConnectionError("server is gone")


def nodes(*kinds: str) -> dict:
    return compose_config("data=digits", f"logger=[{','.join(kinds)}]").logger


def fit(out, loggers, epochs=2) -> pl.Trainer:
    torch.manual_seed(0)
    recorder = Recorder(out)
    trainer = pl.Trainer(
        max_epochs=epochs,
        limit_train_batches=3,
        limit_val_batches=1,
        accelerator="cpu",
        logger=loggers,
        callbacks=[recorder],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = SlimmingModule(Net(), 10, lambda p: torch.optim.SGD(p, 0.1), sparsity=0.05)
    trainer.fit(module, datamodule=Digits(image_size=8, batch_size=32))
    return recorder


def leave(out, figures, parent=None, **more) -> None:
    """Write what a stage leaves."""
    for name in figures:
        Image.new("RGB", (6, 4), (255, 0, 0)).save(out / name)
    result = {"status": "finished", "parent": parent, "metrics": {"test/acc": 0.5}} | more
    result |= {"cost": {"num_params": 100, "macs": 2000, "uncounted": []}, "config": CONFIG}
    (out / "result.json").write_text(json.dumps(result))


def chain(tmp_path, kind: str) -> None:
    """Track a training and the pruning of what it left."""
    train, prune = tmp_path / "vgg_digits" / "first", tmp_path / "prune" / "second"
    for folder in (train, prune):
        folder.mkdir(parents=True)
    with Tracking("train", nodes(kind), train, None, build) as tracking:
        fit(train, tracking.loggers(CONFIG))
        leave(train, ["curves.png", "gammas.png"])
    with Tracking("prune", nodes(kind), prune, str(train / "last.ckpt"), build) as tracking:
        tracking.loggers(CONFIG)
        leave(prune, ["widths.png", "gammas.png"], parent="../../vgg_digits/first/last.ckpt", ratio={"got": 0.25})


# --- what arrives -----------------------------------------------------------------------------------------------------


def test_mlflow(tmp_path):
    chain(tmp_path, "mlflow")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"file:{tmp_path}/mlruns")
    (experiment,) = [e for e in client.search_experiments() if e.name == "slimming"]
    runs = client.search_runs([experiment.experiment_id], "tags.`group` = 'vgg_digits_first'")
    stages = {run.data.tags["stage"]: run for run in runs}
    assert set(stages) == {"train", "prune"} and {run.info.status for run in runs} == {"FINISHED"}
    train, prune = stages["train"], stages["prune"]
    assert set(train.data.metrics) >= METRICS and train.data.params["model/name"] == "net"
    for key in METRICS:
        assert len(client.get_metric_history(train.info.run_id, key)) == 2, f"{key}: one value per epoch"
    assert {k: v for k, v in train.data.metrics.items() if k.startswith("final/")} == FINAL
    assert prune.data.metrics == FINAL | {"final/ratio": 0.25}
    files = {stage: {f.path for f in client.list_artifacts(run.info.run_id)} for stage, run in stages.items()}
    assert files == {
        "train": {"curves.png", "gammas.png", "result.json", "gamma"},
        "prune": {"widths.png", "gammas.png", "result.json"},
    }
    histograms = client.list_artifacts(train.info.run_id, "gamma")
    assert [f.path for f in histograms] == ["gamma/step-00000002.json", "gamma/step-00000005.json"]  # 3 steps an epoch
    content = json.loads(Path(client.download_artifacts(train.info.run_id, histograms[0].path)).read_text())
    assert sum(content["counts"]) == 6 + 6 + 3 and len(content["edges"]) == len(content["counts"]) + 1


def test_wandb(tmp_path, monkeypatch):
    import wandb

    rows, ends = {}, {}  # of each run: what was logged; the run itself, and its summary when it was finished
    log, finish = wandb.Run.log, wandb.Run.finish
    monkeypatch.setattr(wandb.Run, "log", lambda run, row: rows.setdefault(run.id, []).append(row) or log(run, row))
    keep = lambda run: ends.update({run.id: (run, dict(run.summary))})  # noqa: E731
    monkeypatch.setattr(wandb.Run, "finish", lambda run, **kwargs: keep(run) or finish(run, **kwargs))
    chain(tmp_path, "wandb")
    (train, at_the_end), (prune, _) = ends.values()
    assert [run.settings._offline for run in (train, prune)] == [True, True] and wandb.run is None
    assert [(run.group, run.job_type, run.name, run.project) for run in (train, prune)] == [
        ("vgg_digits_first", "train", "first", "slimming"),
        ("vgg_digits_first", "prune", "second", "slimming"),
    ]
    assert train.config["model"] == {"name": "net"}
    for key in METRICS | {"gamma"}:
        steps = [row["trainer/global_step"] for row in rows[train.id] if key in row]
        assert steps == [2, 5], f"{key}: once per epoch, of 3 steps each"
    assert set(at_the_end) >= METRICS and at_the_end["gamma"]["_type"] == "histogram"
    figures = {train.id: {"curves", "gammas"}, prune.id: {"widths", "gammas"}}
    for run, summary in ends.values():
        more = {"final/ratio": 0.25} if run is prune else {}
        assert {k: v for k, v in summary.items() if k.startswith("final/")} == FINAL | more
        files = next(tmp_path.glob(f"*/*/wandb/offline-run-*-{run.id}")) / "files"
        assert json.loads((files / "result.json").read_text())["status"] == "finished"
        assert not (files / "result.json").is_symlink()
        assert {p.name.split("_")[0] for p in (files / "media" / "images").iterdir()} == figures[run.id]


def test_tensorboard(tmp_path):
    chain(tmp_path, "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for folder, figures, epochs in (
        ("vgg_digits/first", {"curves", "gammas"}, 2),
        ("prune/second", {"widths", "gammas"}, 0),
    ):
        events = EventAccumulator(str(tmp_path / folder), size_guidance={"histograms": 0})
        events.Reload()
        tags = events.Tags()
        assert set(tags["images"]) == figures and "result/text_summary" in tags["tensors"]
        assert set(FINAL) <= set(tags["scalars"]) and tags["histograms"] == ["gamma"] * bool(epochs)
        assert (
            [e.step for e in events.Scalars("train/loss")] == [2, 5] if epochs else "train/loss" not in tags["scalars"]
        )
        assert all(len(events.Histograms(tag)) == epochs for tag in tags["histograms"])


@pytest.mark.parametrize("kind", ["wandb", "mlflow"])
def test_a_resumed_stage_goes_on_in_its_run(kind, tmp_path):
    seen = []
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), Tracking("train", nodes(kind), tmp_path, None, build) as tracking:
            (logger,) = tracking.loggers(CONFIG | {"resume": bool(seen)})  # MLflow refuses to change a parameter
            logger.log_metrics({"train/loss": 1.0}, len(seen))
            seen.append(logger.version)
            raise KeyboardInterrupt
    assert seen[0] == seen[1] == json.loads((tmp_path / IDS).read_text())[kind]
    if kind == "mlflow":
        run = logger.experiment.get_run(logger.run_id)
        assert run.info.status == "FAILED" and run.data.params["sparsity"] == "0.05"
        assert len(logger.experiment.get_metric_history(logger.run_id, "train/loss")) == 2


# --- what fails -------------------------------------------------------------------------------------------------------


def test_a_server_that_goes_away_is_told_once_and_the_run_goes_on(tmp_path, capsys):
    other = {"_target_": "lightning.pytorch.loggers.CSVLogger", "version": "other"}
    Broken.calls = 0
    group = {"mine": {"_target_": f"{__name__}.Broken"}, "csv": other}
    with Tracking("train", group, tmp_path, None, build) as tracking:
        history = fit(tmp_path, tracking.loggers(CONFIG), epochs=3).history
        leave(tmp_path, ["curves.png"])
    assert len(history) == 3 and (tmp_path / "last.ckpt").exists() and Broken.calls == 3
    told = capsys.readouterr().err
    assert told.count("WARNING: logger=mine has failed") == 1 and "ConnectionError: server is gone" in told
    assert "final/test/acc" in next(tmp_path.rglob("other/metrics.csv")).read_text()


def test_a_logger_that_cannot_start_is_left_out(tmp_path, capsys):
    (tmp_path / "mlruns").write_text("a file where the folder should be")
    with Tracking("train", nodes("mlflow"), tmp_path, None, build) as tracking:
        history = fit(tmp_path, tracking.loggers(CONFIG)).history
        leave(tmp_path, [])
    assert len(history) == 2 and "WARNING: logger=mlflow has failed" in capsys.readouterr().err


def test_an_attachment_that_fails_costs_nothing(tmp_path, capsys, monkeypatch):
    with Tracking("prune", nodes("tensorboard"), tmp_path, None, build) as tracking:
        tracking.loggers(CONFIG)
        leave(tmp_path, [])
        (tmp_path / "gammas.png").write_bytes(b"no image")
    assert capsys.readouterr().err.count("WARNING: logger=tensorboard has failed") == 1


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_named_before_anything_is_written(kind, tmp_path, monkeypatch):
    for package in (kind, "tensorboardX"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"logger={kind} needs the package {kind}: pip install 'slimming\[{kind}\]'"):
        Tracking("train", nodes(kind), tmp_path, None, build)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_runs_does_not_pass_for_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match="needs the package wandb"):
        Tracking("train", nodes("wandb"), tmp_path, None, build)


@pytest.mark.parametrize("kind", ["wandb", "mlflow"])
def test_a_wrong_argument_is_an_error(kind, tmp_path):
    group = {kind: nodes(kind)[kind] | {"projetc": "x"}}
    with (
        pytest.raises(ConfigError, match=rf"logger\.{kind}: .*projetc"),
        Tracking("train", group, tmp_path, None, build) as t,
    ):
        t.loggers(CONFIG)


def test_a_stage_that_fails_before_it_asks_for_loggers_leaves_nothing(tmp_path):
    with pytest.raises(ConfigError), Tracking("train", nodes("tensorboard", "mlflow"), tmp_path, None, build):
        raise ConfigError("no data")
    assert not list(tmp_path.iterdir())


def test_other_ranks_do_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with Tracking("train", nodes("tensorboard", "mlflow"), tmp_path, None, build) as tracking:
        loggers = tracking.loggers(CONFIG)
        assert [type(logger) for logger in loggers] == [DummyLogger] * 2
        leave(tmp_path, [])
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


# --- groups -----------------------------------------------------------------------------------------------------------


def test_a_chain_is_named_by_its_first_run_directory(tmp_path):
    first, second, third = (tmp_path / "runs" / name for name in ("a", "b", "c"))
    for folder, parent in ((first, None), (second, "../a/last.ckpt"), (third, "../b/pruned.ckpt")):
        folder.mkdir(parents=True)
        leave(folder, [], parent=parent)
    assert group_of(first, None) == "runs_a"
    assert group_of(second, str(first / "last.ckpt")) == "runs_a"
    assert group_of(third, "runs/b/pruned.ckpt") == "runs_a"  # as given on the command line, seen from here
    (tmp_path / "away" / "runs").parent.mkdir()
    (tmp_path / "runs").rename(tmp_path / "away" / "runs")  # a tree of runs may be moved
    assert group_of(tmp_path / "away/runs/c", "away/runs/b/pruned.ckpt") == "runs_a"


def test_the_stages_of_slim_share_its_folder(tmp_path):
    run = tmp_path / "vgg11_digits" / "2026-11-22"
    sparse, pruned = run / "sparse", run / "pass-2" / "ratio-0.5" / "pruned"
    for folder in (run / ".hydra", sparse, pruned):
        folder.mkdir(parents=True)
    leave(sparse, [])
    assert group_of(sparse, None) == group_of(run / "baseline", None) == "vgg11_digits_2026-11-22"
    assert group_of(pruned, str(sparse / "last.ckpt")) == "vgg11_digits_2026-11-22"


def test_chains_that_end_in_something_else(tmp_path):
    out, other = tmp_path / "x" / "out", tmp_path / "x" / "other"
    for folder in (out, other):
        folder.mkdir(parents=True)
    assert group_of(out, "models/model_best.pth.tar") == "x_out"  # of a public code: no stage of ours
    (other / "result.json").write_text("[torn")
    assert group_of(out, str(other / "last.ckpt")) == "x_other"
    leave(out, [], parent="../other/last.ckpt")
    leave(other, [], parent="../out/last.ckpt")
    assert group_of(out, str(other / "last.ckpt")) in ("x_out", "x_other")  # a circle ends
    assert len(group_of(tmp_path / "long" / ("n" * 200), None)) == 128


def test_a_group_that_is_given_stays(tmp_path):
    group = {"mlflow": nodes("mlflow")["mlflow"] | {"tags": {"group": "table-2", "more": "x"}}}
    with Tracking("train", group, tmp_path, None, build) as tracking:
        (logger,) = tracking.loggers(CONFIG)
    tags = logger.experiment.get_run(logger.run_id).data.tags
    assert (tags["group"], tags["stage"], tags["more"]) == ("table-2", "train", "x")


def test_final_metrics_of_the_records_that_are_shipped():
    found = [final_metrics(json.loads(path.read_text())) for path in sorted((ROOT / "results").rglob("result.json"))]
    assert all({"final/num_params", "final/macs"} <= set(metrics) for metrics in found) and found
    assert all({"final/test/acc", "final/test/map50"} & set(metrics) for metrics in found)
    assert any("final/ratio" in metrics for metrics in found)
