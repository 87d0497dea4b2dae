"""The pruning stage from a checkpoint to files, and everything that may go wrong on the way."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torch import nn

import reference_networks as reference_net
import slimming
from conftest import ROOT, SMALL, compose_config
from slimming import checkpoint, models, stages
from slimming.channels.embedding import selecting
from slimming.channels.plan import PruningPlan
from slimming.data import Digits
from slimming.errors import CheckpointError, ConfigError, DataError, GraphError
from slimming.stages import scoring
from slimming.stages.pruning_text import inspection

LEFT = {"pruned.ckpt", "plan.json", "result.json", "widths.png", "gammas.png"}
QUICK = ("latency_batch=2", "calibrate.batches=3", "trainer.accelerator=cpu")


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """A trained network's checkpoint: 8 and 12 channels, their scales spread."""
    out = tmp_path_factory.mktemp("sparse")
    widths = ["model.widths=[8,M,12]", "trainer.max_epochs=3", "sparsity=0.01", "data.val_size=100"]
    stages.train(compose_config(*SMALL, *widths), out)
    return out / "last.ckpt"


def prune(path, out, *overrides):
    return stages.prune(compose_config(f"checkpoint={path}", *QUICK, *overrides, name="prune"), out)


def result(out):
    return json.loads((out / "result.json").read_text())


def state(out):
    return checkpoint.read(out / "pruned.ckpt").content["state_dict"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_pruning_leaves_its_record(sparse, tmp_path, capsys):
    accuracy = prune(sparse, tmp_path, "ratio=0.5")
    assert set(os.listdir(tmp_path)) == LEFT
    r = result(tmp_path)
    assert (r["status"], r["stage"], r["role"], r["model"], r["data"]) == (
        "finished",
        "prune",
        "pruned",
        "vgg11",
        "digits",
    )
    assert r["metrics"].keys() == {f"{s}/acc{x}" for s in ("val", "test") for x in ("_before", "_pruned", "")}
    assert r["metrics"]["test/acc"] == accuracy and r["n_test"] == 359
    trained = json.loads((sparse.parent / "result.json").read_text())
    assert r["metrics"]["test/acc_before"] == trained["metrics"]["test/acc"]
    assert r["cost_before"] == trained["cost"] and r["widths_before"] == trained["widths"] == [8, "M", 12]
    assert r["ratio"] == {"asked": 0.5, "got": 0.5} and sum(w for w in r["widths"] if w != "M") == 10
    assert os.path.samefile(tmp_path / r["parent"], sparse)
    model = slimming.load(tmp_path / "pruned.ckpt")
    cost = slimming.cost(model, torch.zeros(1, 1, 8, 8))
    assert r["cost"] == {"num_params": cost.num_params, "macs": cost.macs}
    assert sum(layer["macs"][1] for layer in r["layers"]) == cost.macs
    assert r["latency_ms"].keys() == {"before", "after", "batch", "device", "precision"}
    assert r["size_bytes"] == sum(v.numel() * v.element_size() for v in model.state_dict().values())
    assert (sum(r["gammas"]["kept"]), sum(r["gammas"]["removed"])) == (10, 10)
    plan = PruningPlan.from_json((tmp_path / "plan.json").read_text())
    assert plan.to_dict() == checkpoint.read(tmp_path / "pruned.ckpt").content["slimming"]["plans"][0]
    gammas = slimming.trace(slimming.load(sparse), torch.zeros(1, 1, 8, 8)).scores("gamma")
    assert r["gammas"]["threshold"] == pytest.approx(float(gammas.sort().values[9]))
    for name in ("widths.png", "gammas.png"):
        Image.open(tmp_path / name).verify()
    text = capsys.readouterr().out
    assert f"widths: {json.dumps(r['widths'])}" in text and "10 of 20 candidates removed, 50.0% (asked 50.0%)" in text


def test_aligned_from_the_command_line(tmp_path, capsys):
    """A pre-activation network gets narrower everywhere; what is left is loaded, pruned again and trained further."""
    network = ("model=preresnet20", "model.depth=11", "model.width=0.5", "sparsity=0.01")
    small = [o for o in SMALL if not o.startswith("model")]
    stages.train(compose_config(*network, *small), tmp_path / "sparse")
    prune(tmp_path / "sparse/last.ckpt", tmp_path / "thin", "ratio=0.4", "ties=aligned", "round_to=4")
    text, r = capsys.readouterr().out, result(tmp_path / "thin")
    assert "(asked 40.0%, ties aligned)" in text
    assert (r["ties"], r["config"]["reduce"], r["criterion"]["ties"]) == ("aligned", "mean", "aligned")
    assert r["gammas"]["threshold"] is None  # a mean decides, so that no gamma does
    thin = slimming.load(tmp_path / "thin/pruned.ckpt")
    assert not selecting(thin) and all(m.num_features % 4 == 0 for m in thin.modules() if isinstance(m, nn.BatchNorm2d))
    plan = PruningPlan.from_json((tmp_path / "thin/plan.json").read_text())
    recorded = checkpoint.read(tmp_path / "thin/pruned.ckpt").content["slimming"]["plans"]
    assert plan.zeroed and [plan.to_dict()] == recorded
    options = ("budget.macs=0.7", "ties=aligned", "repair=true", "per=macs")
    prune(tmp_path / "thin/pruned.ckpt", tmp_path / "again", *options)
    prune(tmp_path / "again/pruned.ckpt", tmp_path / "x", "inspect=true")
    text = capsys.readouterr().out
    assert "ties aligned); " in text and "ties=aligned (" in text and "aligned 100.0%" in text
    for init in ("weights", "scratch"):
        chosen = (f"checkpoint={tmp_path / 'again/pruned.ckpt'}", f"init={init}", "trainer.max_epochs=1")
        stages.finetune(compose_config(*chosen, name="finetune"), tmp_path / init)
        assert not selecting(slimming.load(tmp_path / init / "last.ckpt"))


def test_stage_and_library_give_the_same_network(sparse, tmp_path):
    prune(sparse, tmp_path, "ratio=0.4", "ties=apart", "min_channels=4", "data.crop=0")
    model = slimming.load(sparse)
    graph = slimming.trace(model, torch.zeros(1, 1, 8, 8))
    thin = slimming.prune(model, graph.plan(slimming.GlobalRatio(0.4), ties="apart", min_channels=4))
    data = Digits(image_size=8, crop=0, val_size=100, seed=1)
    data.setup()
    thin = slimming.calibrate(thin, data.training_batches(3, torch.device("cpu")))
    assert same({f"model.{k}": v for k, v in thin.state_dict().items()}, state(tmp_path))


def test_the_same_command_gives_the_same_bytes(sparse, tmp_path):
    for name in "ab":
        prune(sparse, tmp_path / name, "ratio=0.5")
    assert same(state(tmp_path / "a"), state(tmp_path / "b"))
    prune(sparse, tmp_path / "c", "ratio=0.5", "score=random")
    assert not same(state(tmp_path / "a"), state(tmp_path / "c"))


def test_what_calibration_does_not_change_is_not_tested_again(sparse, tmp_path, monkeypatch):
    from slimming.stages import pruning

    calls, original = [], pruning.scores
    monkeypatch.setattr(pruning, "scores", lambda *a: calls.append(1) or original(*a))
    prune(sparse, tmp_path / "b", "ratio=0.5", "calibrate.batches=0", "trainer.limit_test_batches=1")
    r = result(tmp_path / "b")
    assert len(calls) == 2 and r["metrics"]["test/acc"] == r["metrics"]["test/acc_pruned"]
    assert r["metrics"]["val/acc"] == r["metrics"]["val/acc_pruned"]


def test_only_what_was_tested_counts(sparse, tmp_path):
    prune(sparse, tmp_path / "a", "ratio=0.5", "trainer.limit_test_batches=1", "+data.eval_batch_size=32")
    assert result(tmp_path / "a")["n_test"] == 32
    prune(sparse, tmp_path / "b", "ratio=0.5", "test=false")
    assert "n_test" not in result(tmp_path / "b")
    prune(sparse, tmp_path / "c", "ratio=0.5", "trainer.limit_test_batches=0", "trainer.limit_val_batches=0")
    assert (result(tmp_path / "c")["n_test"], result(tmp_path / "c")["metrics"]) == (0, {})


def test_calibration_moves_the_statistics_alone(sparse, tmp_path):
    prune(sparse, tmp_path / "a", "ratio=0.5")
    prune(sparse, tmp_path / "b", "ratio=0.5", "calibrate.batches=0")
    a, b = state(tmp_path / "a"), state(tmp_path / "b")
    moved = {k.rpartition(".")[2] for k in a if not torch.equal(a[k], b[k])}
    assert moved == {"running_mean", "running_var", "num_batches_tracked"}
    metrics = [result(tmp_path / n)["metrics"] for n in "ab"]
    assert metrics[0]["test/acc_pruned"] == metrics[1]["test/acc_pruned"] == metrics[1]["test/acc"]


def test_loading_is_bit_identical_in_a_fresh_process_without_lightning(sparse, tmp_path):
    prune(sparse, tmp_path, "ratio=0.5", "test=false")
    code = (
        "import sys, torch, slimming; model = slimming.load(sys.argv[1])\n"
        "assert not {'lightning', 'hydra', 'numpy.testing'} & set(sys.modules)\n"
        "torch.manual_seed(0); print(model(torch.randn(2, 1, 8, 8)).detach().view(torch.int32).tolist())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "pruned.ckpt")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    model = slimming.load(tmp_path / "pruned.ckpt")
    torch.manual_seed(0)
    assert out.strip() == str(model(torch.randn(2, 1, 8, 8)).detach().view(torch.int32).tolist())


def test_a_second_pass(sparse, tmp_path):
    prune(sparse, tmp_path / "1", "ratio=0.4", "ties=apart")
    prune(tmp_path / "1" / "pruned.ckpt", tmp_path / "2", "ratio=0.4", "ties=apart")
    first, second = (checkpoint.read(tmp_path / n / "pruned.ckpt").content["slimming"]["plans"] for n in "12")
    assert len(second) == 2 and second[0] == first[0]
    assert result(tmp_path / "2")["widths_before"] == result(tmp_path / "1")["widths"]
    assert result(tmp_path / "2")["cost"]["num_params"] < result(tmp_path / "1")["cost"]["num_params"]
    shutil.rmtree(tmp_path / "1")
    slimming.load(tmp_path / "2" / "pruned.ckpt")(torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize(
    "overrides",
    [
        ["threshold=0.05"],
        ["budget.macs=0.5"],
        ["budget.params=0.5"],
        ["criterion=per_layer", "ratio=0.5"],
        ["criterion=optimal", "delta=0.1"],
        ["ratio=0.5", "convention=reference"],
        ["ratio=0.5", "max_layer_ratio=0.5", "round_to=4", "score=weight_l1"],
        ["ratio=0.5", "ignore=[feature.1]", "reduce=mean"],
    ],
    ids=str,
)
def test_every_criterion(overrides, sparse, tmp_path):
    prune(sparse, tmp_path, *overrides, "test=false", "latency_batch=0")
    r = result(tmp_path)
    widths = [w for w in r["widths"] if w != "M"]
    got, dense = r["cost"], r["cost_before"]
    if overrides[0].startswith("budget"):
        key = {"budget.macs=0.5": "macs", "budget.params=0.5": "num_params"}[overrides[0]]
        assert 0.3 * dense[key] < got[key] <= 0.5 * dense[key]
    elif "criterion=per_layer" in overrides:
        assert widths == [4, 6]
    elif "round_to=4" in overrides:
        assert all(w % 4 == 0 for w in widths) and widths[0] >= 4 and widths[1] >= 6
    elif "ignore=[feature.1]" in overrides:
        assert widths[0] == 8 and widths[1] == 6
    gammas = torch.cat([m.weight.abs() for m in slimming.load(sparse).modules() if isinstance(m, torch.nn.BatchNorm2d)])
    if overrides == ["threshold=0.05"]:
        assert 20 - sum(widths) == int((gammas <= 0.05).sum()) == r["plan"]["removed"]
    assert "latency_ms" not in r and r["metrics"] == {}


def test_a_score_is_measured_on_training_images_alone(sparse, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "IMAGES", 200)
    score = "reconstruction"
    prune(sparse, tmp_path, "ratio=0.5", f"score={score}", "test=false", "calibrate.batches=0")
    model, data = slimming.load(sparse), Digits(image_size=8, crop=1, val_size=100, seed=1)
    data.setup()
    graph = slimming.trace(model, torch.zeros(1, 1, 8, 8))
    batches = [*data.training_batches(4, torch.device("cpu"), augment=False)]  # 4 of 64 reach 200
    plan = graph.plan(slimming.GlobalRatio(0.5), score=score, batches=batches)
    assert PruningPlan.from_json((tmp_path / "plan.json").read_text()) == plan
    r = result(tmp_path)
    assert r["score"] == r["criterion"]["score"] == r["config"]["score"] == score and r["gammas"]["threshold"] is None


def test_nothing_to_remove_is_said(sparse, tmp_path, capsys):
    prune(sparse, tmp_path, "threshold=1e-9", "test=false")
    assert "nothing is removed" in capsys.readouterr().out
    assert result(tmp_path)["cost"] == result(tmp_path)["cost_before"]


def test_inspecting_writes_nothing(sparse, tmp_path, capsys):
    prune(sparse, tmp_path / "run", "inspect=true", "data.root=not-needed")
    assert not (tmp_path / "run").exists()
    text = capsys.readouterr().out
    assert "feature.1 " in text and "ties=apart (20 candidates)" in text
    assert "of the candidates are near zero" in text and "sparsity=auto target_ratio=" in text


def test_the_guide_finds_the_share_that_was_made_zero(capsys):
    model = models.vgg(widths=[20, "M", 20])
    with torch.no_grad():
        for norm, gone in ((model.feature[1], 17), (model.feature[5], 1)):
            norm.weight.uniform_(0.5, 1)[:gone] = 0.0
    text = inspection(slimming.trace(model, torch.zeros(1, 3, 32, 32)))
    assert "45.0% of the candidates are near zero" in text and "ratio=0.45: what is near zero" in text
    assert "0.4           0.00%   feature.1 keeps 4 of 20" in text, (
        "the share of squared gammas, and the thinnest layer"
    )


def test_without_data(sparse, tmp_path, monkeypatch):
    monkeypatch.setattr(Digits, "load", lambda *a: pytest.fail("data were loaded"))
    prune(sparse, tmp_path, "ratio=0.5", "calibrate.batches=0", "test=false")
    assert result(tmp_path)["metrics"] == {}


def test_a_network_of_ones_own_class(tmp_path):
    cfg = compose_config(*[o for o in SMALL if not o.startswith("model")], "trainer.max_epochs=1")
    cfg.model = {"_target_": "test_prune_stage.own_network", "width": 6}
    stages.train(cfg, tmp_path / "train")
    path = tmp_path / "train" / "last.ckpt"
    with pytest.raises(CheckpointError, match=r"not registered.* model._target_"):
        prune(path, tmp_path / "a", "ratio=0.5")
    own = ("model._target_=test_prune_stage.own_network", "+model.width=6")
    prune(path, tmp_path / "b", "ratio=0.5", "test=false", *own)
    thin = slimming.load(tmp_path / "b" / "pruned.ckpt", model=own_network(6))
    assert thin(torch.zeros(1, 1, 8, 8)).shape == (1, 10) and result(tmp_path / "b")["widths"] == [3]


def test_what_multiplies_and_is_not_counted_is_told(tmp_path, capsys):
    cfg = compose_config(*[o for o in SMALL if not o.startswith("model")], "trainer.max_epochs=1")
    cfg.model = {"_target_": "test_prune_stage.distances", "width": 6}
    stages.train(cfg, tmp_path / "train")
    own = ("model._target_=test_prune_stage.distances", "+model.width=6")
    prune(tmp_path / "train/last.ckpt", tmp_path / "b", "ratio=0.5", "test=false", *own)
    assert capsys.readouterr().out.count(" (not counted: cdist)\n") == 2
    records = [
        result(tmp_path / "train")["cost"],
        result(tmp_path / "b")["cost"],
        result(tmp_path / "b")["cost_before"],
    ]
    assert [r["uncounted"] for r in records] == [["cdist"]] * 3


class Distances(torch.nn.Module):
    def forward(self, x):  # (N, C) -> (N, C), by the distance of every item to the first
        return x + torch.cdist(x, x[:1])


def distances(width: int, **heads):
    return torch.nn.Sequential(*own_network(width, **heads), Distances())


def own_network(width: int, num_classes: int = 10, in_channels: int = 1):
    """Not registered in slimming.models."""
    layers = [torch.nn.Conv2d(in_channels, width, 3, bias=False), torch.nn.BatchNorm2d(width), torch.nn.ReLU()]
    head = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(width, num_classes)]
    return torch.nn.Sequential(*layers, *head)


def test_a_port_with_data_and_without(tmp_path, monkeypatch):
    torch.manual_seed(0)
    theirs = reference_net.shake(reference_net.ResNet(20, pruned=True))
    path = tmp_path / "pruned.pth.tar"
    torch.save({"cfg": [], "state_dict": theirs.state_dict()}, path)
    model = ("model=preresnet20", "latency_batch=0")
    prune(path, tmp_path / "a", *model, "threshold=0", "test=false", "calibrate.batches=0")
    images = torch.randn(2, 3, 32, 32)
    ours = slimming.load(tmp_path / "a" / "pruned.ckpt")
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)
    assert len(checkpoint.read(tmp_path / "a" / "pruned.ckpt").content["slimming"]["plans"]) == 2
    with pytest.raises(DataError, match=r"give data=cifar10 .* calibrate.batches=0 test=false"):
        prune(path, tmp_path / "b", *model, "ratio=0.5")
    with pytest.raises(ConfigError, match="reference implementation and does not name its network: give model=vgg19"):
        prune(path, tmp_path / "c", "ratio=0.5", "test=false", "calibrate.batches=0")


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["ratio=1"], ConfigError, r"ratio must be a number >= 0 and < 1"),
        (["ratio=-0.1"], ConfigError, "ratio must be a number >= 0 and < 1, got -0.1"),
        (["threshold=-1"], ConfigError, "threshold must be"),
        (["budget.macs=0"], ConfigError, "budget.macs must be"),
        (["budget.macs=1e-6"], GraphError, r"budget.macs=1e-06 cannot be reached: .* 0\.\d+ of the dense macs"),
        (["ratio=0.5", "ties=loose"], ConfigError, "ties must be one of together, apart"),
        (["ratio=0.5", "score=taste"], ConfigError, "score must be one of"),
        (["ratio=0.5", "min_channels=0"], ConfigError, "min_channels"),
        (["ratio=0.5", "max_layer_ratio=0"], ConfigError, "max_layer_ratio"),
        (["ratio=0.5", "round_to=0"], ConfigError, "round_to"),
        (["threshold=0.1", "convention=reference"], ConfigError, "convention=reference is for a global ratio only"),
        (["ratio=0.5", "criterion=per_layer", "convention=reference"], ConfigError, "for a global ratio only"),
        (
            [
                "ratio=0.5",
                "score=reconstruction",
                "test=false",
                "calibrate.batches=0",
                "data=image_folder",
                "data.root=nowhere",
            ],
            DataError,
            "score=reconstruction, calibration and accuracy need the data: .* by score=gamma calibrate.batches=0 test",
        ),
        (["ratio=0.5", "data.root=/x"], ConfigError, "data: .*root"),
        (["ratio=0.5", "data=image_folder", "data.root=nowhere"], DataError, "calibrate.batches=0 test=false"),
        (["ratio=0.5", "data=cifar100", "data.root=nowhere", "data.download=false"], DataError, "CIFAR100 is not"),
        (["ratio=0.5", "model=vgg11"], CheckpointError, "another architecture"),
        (["ratio=0.5", "trainer.precision=17"], ConfigError, "trainer: .*17"),
    ],
    ids=str,
)
def test_bad_values(overrides, error, words, sparse, tmp_path):
    with pytest.raises(error, match=words):
        prune(sparse, tmp_path, *overrides)
    assert set(os.listdir(tmp_path)) <= {"result.json"}
    assert not os.listdir(tmp_path) or result(tmp_path)["status"] == "failed"


@pytest.mark.parametrize("words", ["there is no checkpoint", "truncated", "was not written by slimming", "run code"])
def test_bad_checkpoints(words, sparse, tmp_path):
    path = tmp_path / "x.ckpt"
    if words == "truncated":
        path.write_bytes(sparse.read_bytes()[:4000])
    elif words == "was not written by slimming":
        torch.save({"state_dict": {"a": torch.zeros(1)}}, path)
    elif words == "run code":
        torch.save({"state_dict": {}, "x": Evil()}, path)
    with pytest.raises(CheckpointError, match=words):
        prune(path, tmp_path / "run", "ratio=0.5")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "os.mkdir", "path": "evil"},
        {"_target_": "slimming.data.base.torch.save", "obj": 1, "f": "evil"},
        {"_target_": "slimming.data.Digits", "image_size": {"_target_": "os.mkdir", "path": "evil"}},
        {"_target_": "slimming.data.Digits", "_args_": [{"_target_": "os.mkdir", "path": "evil"}]},
        {"_target_": "slimming.data.Digits", "crop": [{"_target_": "os.mkdir", "path": "evil"}]},
        {"_target_": "slimming.data.Digits", "crop": "${oc.create:{_target_:os.mkdir,path:evil}}"},
    ],
)
def test_what_a_checkpoint_names_is_not_run(node, sparse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = checkpoint.read(sparse).content
    content["slimming"]["config"]["data"] = node
    checkpoint.write(content, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError, match="not built on a file's word alone"):
        prune(tmp_path / "evil.ckpt", tmp_path / "run", "ratio=0.5")
    assert not (tmp_path / "evil").exists()
    prune(tmp_path / "evil.ckpt", tmp_path / "run", "ratio=0.5", "data=digits", "data.image_size=8")


def test_a_recorded_precision_is_not_run(sparse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = checkpoint.read(sparse).content
    content["slimming"]["config"]["trainer"]["precision"] = {"_target_": "os.mkdir", "path": "evil"}
    checkpoint.write(content, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError, match="not built on a file's word alone"):
        prune(tmp_path / "evil.ckpt", tmp_path / "run", "ratio=0.5")
    assert not (tmp_path / "evil").exists()
    prune(tmp_path / "evil.ckpt", tmp_path / "run", "ratio=0.5", "test=false", "trainer.precision=32-true")
    assert not (tmp_path / "evil").exists()


def test_a_recorded_strategy_is_not_needed(sparse, tmp_path):
    content = checkpoint.read(sparse).content
    content["slimming"]["config"]["trainer"] |= {"strategy": {"_target_": "my.Strategy"}, "precision": "64-true"}
    checkpoint.write(content, tmp_path / "own.ckpt")
    prune(tmp_path / "own.ckpt", tmp_path / "run", "ratio=0.5", "test=false")
    assert result(tmp_path / "run")["latency_ms"]["precision"] == "64-true"


def test_a_pruned_network_is_not_overwritten(sparse, tmp_path):
    prune(sparse, tmp_path, "ratio=0.5", "test=false")
    before = (tmp_path / "pruned.ckpt").read_bytes()
    with pytest.raises(ConfigError, match="holds a pruned network already"):
        prune(sparse, tmp_path, "ratio=0.6", "test=false")
    assert (tmp_path / "pruned.ckpt").read_bytes() == before and result(tmp_path)["status"] == "finished"


def test_data_are_loaded_once_for_several_prunings(sparse, tmp_path, monkeypatch):
    calls, load = [], Digits.load
    monkeypatch.setattr(Digits, "load", lambda self, train: calls.append(train) or load(self, train))
    accuracies = [prune(sparse, tmp_path / str(r), f"ratio={r}") for r in (0.3, 0.5, 0.3000001)]
    assert calls == [True, False] and accuracies[0] == accuracies[2]


def test_double_precision_is_kept(sparse, tmp_path):
    content = checkpoint.read(sparse).content
    content["state_dict"] = {
        k: v.double() + 1e-12 if v.is_floating_point() else v for k, v in content["state_dict"].items()
    }
    content["slimming"]["config"]["trainer"]["precision"] = "64-true"
    checkpoint.write(content, tmp_path / "double.ckpt")
    prune(tmp_path / "double.ckpt", tmp_path / "run", "ratio=0.5")
    assert all(v.dtype != torch.float32 for v in state(tmp_path / "run").values())
    assert slimming.load(tmp_path / "run" / "pruned.ckpt").classifier.weight.dtype == torch.float64


@pytest.mark.slow
def test_a_sweep_goes_on_past_a_failing_job_and_single_failures_leave_nothing(sparse, tmp_path):
    command = [sys.executable, str(ROOT / "prune.py")]
    arguments = [f"checkpoint={sparse}", *QUICK]
    done = subprocess.run([*command, "-m", *arguments, "ratio=0.3,1.5,0.30000000000000004"], cwd=tmp_path, **TEXT)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "job 1 failed: ratio must be a number >= 0 and < 1" in done.stderr
    folders = sorted((tmp_path / "runs" / "prune_sweep").glob("*/*/"))
    assert [f.name for f in folders] == ["0_ratio-0.3_gamma", "1_ratio-1.5_gamma", "2_ratio-0.3_gamma"]
    assert [result(f)["status"] for f in folders] == ["finished", "failed", "finished"]
    shutil.rmtree(tmp_path / "runs")
    for wrong in (["ratio=0.3", "threshold=1"], ["inspect=true"]):
        done = subprocess.run([*command, *arguments, *wrong], cwd=tmp_path, **TEXT)
        assert done.returncode == ("inspect=true" not in wrong), done.stderr
        assert not list(tmp_path.glob("runs/*"))


TEXT = {"capture_output": True, "text": True, "timeout": 300}


@pytest.mark.slow
def test_a_parallel_sweep_survives_a_failing_job(sparse, tmp_path):
    command = [sys.executable, str(ROOT / "prune.py"), "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = subprocess.run([*command, f"checkpoint={sparse}", *QUICK, "ratio=0.3,1.5,0.5"], cwd=tmp_path, **TEXT)
    assert done.returncode == 1 and "ratio must be a number >= 0 and < 1" in done.stderr
    folders = sorted((tmp_path / "runs" / "prune_sweep").glob("*/*/"))
    assert [result(f)["status"] for f in folders] == ["finished", "failed", "finished"]
    subprocess.run([sys.executable, str(ROOT / "report.py")], cwd=tmp_path, check=True, **TEXT)
    text = (tmp_path / "runs" / "report.md").read_text()
    assert "ratio must be a number >= 0 and < 1" in text.split("What failed")[1] and "ratio 0.3" in text


def test_a_repair_is_recorded_and_is_what_the_library_does(sparse, tmp_path, capsys):
    accuracy = prune(sparse, tmp_path, "ratio=0.5", "repair.images=200", "repair.ridge=1e-2", "calibrate.batches=0")
    r = result(tmp_path)
    assert r["metrics"]["test/acc"] == accuracy and r["config"]["repair"] == {"images": 200, "ridge": 0.01}
    assert {k: v for k, v in r["repair"].items() if k != "seconds"} == {
        "images": 200,
        "ridge": 0.01,
        "layers": 2,
        "left": {},
    }
    text = capsys.readouterr().out
    assert text.count("repaired: 2 layers refitted on 200 training images in ") == 1
    assert f"-> {accuracy:.2%} repaired on 200 images\n" in text
    model = slimming.load(sparse)
    plan = slimming.trace(model, torch.zeros(1, 1, 8, 8)).plan(slimming.GlobalRatio(0.5))
    data = Digits(image_size=8, crop=1, val_size=100, seed=1)
    data.setup()
    images = torch.cat([*data.training_batches(4, torch.device("cpu"), augment=False)])[:200]
    ours = slimming.repair(model, slimming.prune(model, plan), plan, [images], ridge=1e-2)
    assert same({f"model.{k}": v for k, v in ours.state_dict().items()}, state(tmp_path))


def test_a_repair_comes_before_the_calibration(sparse, tmp_path, capsys):
    prune(sparse, tmp_path / "a", "ratio=0.5", "repair.images=128", "test=false", "calibrate.batches=0")
    prune(sparse, tmp_path / "b", "ratio=0.5", "repair.images=128")
    prune(sparse, tmp_path / "c", "ratio=0.5", "repair.images=5000", "test=false")
    assert result(tmp_path / "c")["repair"]["images"] == 1797 - 359 - 100  # every training image once
    a, b = state(tmp_path / "a"), state(tmp_path / "b")
    moved = {k.rpartition(".")[2] for k in a if not torch.equal(a[k], b[k])}
    assert moved == {"running_mean", "running_var", "num_batches_tracked"}
    assert "repaired on 128 images and calibrated on 3 batches" in capsys.readouterr().out


def test_repair_is_off_unless_asked_for_and_takes_the_place_of_calibration(sparse):
    def found(*overrides):
        cfg = compose_config(f"checkpoint={sparse}", "ratio=0.5", *overrides, name="prune")
        return cfg.repair and cfg.repair.images, cfg.calibrate.batches

    assert found() == found("repair=false") == found("repair.images=0") == (None, 100)
    assert found("repair=true") == found("repair.images=2000") == (2000, 0)
    assert found("repair.images=300", "repair.ridge=0.1", "calibrate.batches=7") == (300, 7)
    assert found("calibrate.batches=0") == (None, 0)


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["repair=3"], ConfigError, r"repair must be true, false, or repair.images=<how many>; got 3"),
        (["repair.images=-1"], ConfigError, "repair.images must be a whole number >= 0, got -1"),
        (["repair.images=9", "repair.ridge=-1"], ConfigError, "repair.ridge must be a number >= 0, got -1"),
        (["repair.ridge=0.1"], ConfigError, r"repair.ridge=0.1 needs repair.images=2000 beside it"),
        (["repair.images=1", "repair.ridge=0"], GraphError, r"repair of feature.4: its Gram matrix is singular"),
        (
            ["repair=true", "data=image_folder", "data.root=nowhere"],
            DataError,
            "go without by repair=false calibrate.batches=0 test=false",
        ),
    ],
    ids=str,
)
def test_bad_values_of_a_repair(overrides, error, words, sparse, tmp_path):
    with pytest.raises(error, match=words):
        prune(sparse, tmp_path, "ratio=0.5", "test=false", "calibrate.batches=0", *overrides)
