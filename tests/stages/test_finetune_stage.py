"""Fine-tuning: what it starts from, what it keeps, what it refuses."""

import json
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import slimming
from conftest import ROOT, SMALL, compose_config
from slimming import checkpoint, models, stages
from slimming.data.sampler import mix
from slimming.errors import CheckpointError, ConfigError, SlimmingError
from slimming.records import Record
from slimming.stages import finetuning
from slimming.training.distillation import DistillingModule

SHORT = ("trainer.max_epochs=1", "trainer.limit_train_batches=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sparse training and its pruned network: sparse/last.ckpt, pruned/pruned.ckpt."""
    out = tmp_path_factory.mktemp("runs")
    setting = ["model.widths=[8,M,12]", "sparsity=0.01", "seed=3", "decay_batchnorm=false"]
    stages.train(compose_config(*SMALL, *setting), out / "sparse")
    options = ("ratio=0.5", "ties=apart", "latency_batch=0", "calibrate.batches=2")
    stages.prune(compose_config(f"checkpoint={out}/sparse/last.ckpt", *options, name="prune"), out / "pruned")
    return out


def finetune(path, out, *overrides):
    return stages.finetune(compose_config(f"checkpoint={path}", *overrides, name="finetune"), out)


def result(out):
    return json.loads((out / "result.json").read_text())


def state(out, name="last.ckpt"):
    return checkpoint.read(out / name).content["state_dict"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_recipe_is_the_trainings_without_the_penalty(folder, tmp_path):
    accuracy = finetune(folder / "pruned/pruned.ckpt", tmp_path)
    r, before = result(tmp_path), result(folder / "sparse")
    assert (r["stage"], r["role"], r["seed"]) == ("finetune", "finetuned", 3)
    for key in ("model", "data", "optimizer", "scheduler", "trainer", "decay_batchnorm", "seed"):
        assert r["config"][key] == before["config"][key], key
    assert r["config"]["sparsity"] == 0 and r["metrics"]["test/acc"] == accuracy
    assert r["widths"] == result(folder / "pruned")["widths"] and r["cost"] == result(folder / "pruned")["cost"]
    assert (tmp_path / r["parent"]).resolve() == (folder / "pruned/pruned.ckpt").resolve()
    thin = slimming.load(tmp_path / "last.ckpt")
    assert slimming.cost(thin, torch.zeros(1, 1, 8, 8)).num_params == r["cost"]["num_params"]


def test_values_given_now_replace_the_recipes(folder, tmp_path):
    path = folder / "pruned/pruned.ckpt"
    finetune(path, tmp_path, "trainer.max_epochs=4", "optimizer.lr=0.02", "seed=7", "data.crop=0", "sparsity=0.5")
    config, history = result(tmp_path)["config"], result(tmp_path)["history"]
    assert [row["lr"] for row in history] == pytest.approx([0.02, 0.02, 0.002, 0.0002])  # of 2 epochs: 0.1, 0.01
    assert (config["data"]["seed"], config["data"]["crop"], config["data"]["image_size"]) == (7, 0, 8)
    assert result(tmp_path)["role"] == "sparse" and all(row["train/penalty"] > 0 for row in history)


@pytest.mark.parametrize("name", ["constant", "cosine", "multistep"])
def test_another_schedule_fits_the_epochs(name, folder, tmp_path):
    finetune(folder / "pruned/pruned.ckpt", tmp_path, f"scheduler={name}", *SHORT)
    assert result(tmp_path)["history"][0]["lr"] == pytest.approx(0.1)


def test_the_first_loss_is_the_same_in_a_fresh_process(folder, tmp_path):
    finetune(folder / "pruned/pruned.ckpt", tmp_path / "here", *SHORT)
    command = [sys.executable, str(ROOT / "finetune.py"), f"checkpoint={folder}/pruned/pruned.ckpt", *SHORT]
    subprocess.run([*command, f"hydra.run.dir={tmp_path}/there"], check=True, capture_output=True, cwd=tmp_path)
    here, there = (result(tmp_path / p)["history"][0] for p in ("here", "there"))
    assert here["train/loss"] == there["train/loss"]
    assert same(state(tmp_path / "here"), state(tmp_path / "there"))


def test_fine_tuning_starts_from_the_calibrated_weights_and_scratch_from_none(folder, tmp_path):
    frozen = (*SHORT, "optimizer.lr=1e-12", "optimizer.weight_decay=0")
    path = folder / "pruned/pruned.ckpt"
    finetune(path, tmp_path / "a", *frozen)
    finetune(path, tmp_path / "b", *frozen, "init=scratch")
    trained, kept, fresh = (slimming.load(p) for p in (path, tmp_path / "a/last.ckpt", tmp_path / "b/last.ckpt"))
    torch.testing.assert_close(dict(kept.named_parameters()), dict(trained.named_parameters()))
    assert checkpoint.read(tmp_path / "b/last.ckpt").record.plans == checkpoint.read(path).record.plans
    for (name, a), b in zip(trained.named_parameters(), fresh.parameters(), strict=True):
        assert a.shape == b.shape and not torch.isclose(a, b, rtol=1e-3).any(), name
    assert result(tmp_path / "b")["role"] == "scratch"
    indices = [[m.select for m in net.modules() if hasattr(m, "select")] for net in (trained, fresh)]
    assert len(indices[0]) == len(indices[1])


def test_scratch_begins_as_a_network_built_at_the_thin_widths(folder, tmp_path):
    finetune(
        folder / "pruned/pruned.ckpt",
        tmp_path,
        *SHORT,
        "optimizer.lr=1e-12",
        "optimizer.weight_decay=0",
        "init=scratch",
    )
    torch.manual_seed(mix(3, finetuning.SCRATCH))
    fresh = models.vgg(widths=result(folder / "pruned")["widths"], in_channels=1)
    scratch = slimming.load(tmp_path / "last.ckpt")
    torch.testing.assert_close(dict(scratch.named_parameters()), dict(fresh.named_parameters()))


class Pretrained(torch.nn.Sequential):
    """Not registered, and comes trained: all its weights are 9."""

    def __init__(self, width: int = 6, raw: bool = False, num_classes: int = 10, in_channels: int = 1):
        layers = [torch.nn.Conv2d(in_channels, width, 3, bias=False), torch.nn.BatchNorm2d(width), torch.nn.ReLU()]
        head = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(width, num_classes)]
        super().__init__(*layers, *head)
        if raw:
            self.temperature = torch.nn.Parameter(torch.ones(()))
        for parameter in self.parameters():
            torch.nn.init.constant_(parameter, 9)

    def forward(self, x):
        return super().forward(x) / getattr(self, "temperature", 9)


@pytest.mark.parametrize("raw", [False, True])
def test_a_network_that_comes_pretrained_does_not_start_pretrained(raw, tmp_path):
    cfg = compose_config(*[o for o in SMALL if not o.startswith("model")], "trainer.max_epochs=1", "optimizer.lr=1e-12")
    cfg.model = {"_target_": "test_finetune_stage.Pretrained", "raw": raw}
    cfg.optimizer["weight_decay"] = 0
    stages.train(cfg, tmp_path / "a")
    own = ("model._target_=test_finetune_stage.Pretrained", f"+model.raw={raw}")
    if raw:
        with pytest.raises(ConfigError, match=r"nothing draws the parameter temperature: give its Pretrained a method"):
            finetune(tmp_path / "a/last.ckpt", tmp_path / "b", *own, "init=scratch")
        return
    finetune(tmp_path / "a/last.ckpt", tmp_path / "b", *own, "init=scratch")
    before, after = (slimming.load(tmp_path / name / "last.ckpt", model=Pretrained()) for name in "ab")
    assert float(before[0].weight.min()) > 8.9 and float(after[0].weight.abs().max()) < 0.34  # sqrt(1 / 9)


def test_epochs_by_compute(folder, tmp_path, capsys):
    path = folder / "pruned/pruned.ckpt"
    finetune(path, tmp_path, "init=scratch", "epochs_by=macs", "trainer.max_epochs=2")
    cost = result(folder / "pruned")
    expected = min(8, round(2 * cost["cost_before"]["macs"] / cost["cost"]["macs"]))
    assert expected > 2 and len(result(tmp_path)["history"]) == expected
    assert f"-> {expected} epochs" in capsys.readouterr().out
    assert result(tmp_path)["config"]["scheduler"]["max_epochs"] == expected
    with pytest.raises(ConfigError, match="holds a run already"):
        finetune(path, tmp_path, "init=scratch", "epochs_by=macs", "trainer.max_epochs=2")
    assert result(tmp_path)["status"] == "finished"


def test_interrupted_and_resumed_equals_uninterrupted(folder, tmp_path):
    path, setting = (
        folder / "pruned/pruned.ckpt",
        ("trainer.max_epochs=3", "distill.teacher=" + str(folder) + "/sparse/last.ckpt"),
    )
    finetune(path, tmp_path / "a", *setting)
    stop = "+callbacks.stop={_target_: test_train_stage.Stop, epoch: 1}"
    with pytest.raises(SystemExit):
        finetune(path, tmp_path / "b", *setting, stop)
    assert result(tmp_path / "b")["error"] == "interrupted"
    finetune(path, tmp_path / "b", *setting, "resume=true")
    assert same(state(tmp_path / "a"), state(tmp_path / "b"))
    with pytest.raises(CheckpointError, match=r"distill\.alpha was 0\.9, is 0\.5"):
        finetune(path, tmp_path / "b", *setting, "resume=true", "distill.alpha=0.5")
    assert result(tmp_path / "b")["status"] == "finished"


def test_the_distilled_loss_is_hintons(folder):
    torch.manual_seed(0)
    student, teacher = (models.vgg(widths=[4, "M", 6], num_classes=5).train() for _ in range(2))
    module = DistillingModule(student, 5, optimizer=None, teacher=teacher, temperature=3.0, alpha=0.7)
    images, labels = torch.randn(6, 3, 8, 8), torch.randint(5, (6,))
    logits = student(images)
    loss = module.task_loss(images, logits, labels)
    p, q = (torch.softmax(z / 3, 1) for z in (teacher.eval()(images), logits))
    kl = (p * (p / q).log()).sum(1).mean()
    assert float(loss) == pytest.approx(float(0.7 * 9 * kl + 0.3 * F.cross_entropy(logits, labels)), rel=1e-5)
    loss.backward()
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    assert not any("teacher" in k or "held" in k for k in module.state_dict())
    assert len(list(module.parameters())) == len(list(student.parameters()))


def test_the_optimizer_state_goes_on_when_asked(folder, tmp_path):
    """The first step with momentum equals the masked dense network's: velocity 0.9 * v + g."""
    path = folder / "pruned/pruned.ckpt"
    frozen = ("trainer.max_epochs=1", "trainer.limit_train_batches=1", "optimizer.weight_decay=0")
    finetune(path, tmp_path / "fresh", *frozen)
    finetune(path, tmp_path / "sliced", *frozen, "optimizer_state=true")
    before = checkpoint.read(folder / "sparse/last.ckpt").content
    plan = slimming.PruningPlan.from_dict(checkpoint.read(path).content["slimming"]["plans"][0])
    dense = slimming.load(folder / "sparse/last.ckpt")
    names = [k for k, _ in dense.named_parameters() if not k.endswith((".1.weight", ".1.bias", ".5.weight", ".5.bias"))]
    names += [k for k, _ in dense.named_parameters() if k not in names]  # the BatchNorms' group comes second
    velocity = slimming.prune_optimizer_state(before["optimizer_states"][0], dense, plan, names)["state"]
    a, b = (checkpoint.read(tmp_path / n / "last.ckpt").content["optimizer_states"][0] for n in ("fresh", "sliced"))
    assert a["param_groups"][0]["lr"] == b["param_groups"][0]["lr"]
    for i, old in velocity.items():
        new, gradient = b["state"][i]["momentum_buffer"], a["state"][i]["momentum_buffer"]
        torch.testing.assert_close(new, 0.9 * old["momentum_buffer"] + gradient, rtol=1e-4, atol=1e-6)
    with pytest.raises(ConfigError, match=r"optimizer_state=true: .*SGD, this one uses .*AdamW"):
        finetune(path, tmp_path / "x", *frozen[:2], "optimizer=adamw", "optimizer_state=true")
    with pytest.raises(ConfigError, match="needs the checkpoint that"):
        finetune(folder / "sparse/last.ckpt", tmp_path / "y", "optimizer_state=true")


def test_layers_are_split_first_and_later_stages_know(folder, tmp_path, capsys):
    finetune(folder / "pruned/pruned.ckpt", tmp_path / "split", *SHORT, "low_rank=0.6")
    assert "low rank: " in capsys.readouterr().out
    saved = checkpoint.read(tmp_path / "split/last.ckpt")
    before, after = (result(path)["cost"]["macs"] for path in (folder / "pruned", tmp_path / "split"))
    assert saved.record.low_rank and after < before
    assert result(tmp_path / "split")["config"]["finetune"]["low_rank"] == 0.6
    thin = slimming.load(saved.path)
    assert same({f"model.{k}": v for k, v in thin.state_dict().items()}, state(tmp_path / "split"))
    plans = [slimming.PruningPlan.from_dict(plan) for plan in saved.record.plans]
    more = {"dense": saved.record.model, "low_rank": saved.record.low_rank}
    slimming.save(tmp_path / "again.ckpt", thin, plans=plans, **more)
    assert same(slimming.load(tmp_path / "again.ckpt").state_dict(), thin.state_dict())

    finetune(saved.path, tmp_path / "further", *SHORT)
    assert checkpoint.read(tmp_path / "further/last.ckpt").record.low_rank == saved.record.low_rank
    finetune(saved.path, tmp_path / "scratch", *SHORT, "init=scratch")
    with pytest.raises(ConfigError, match="split already"):
        finetune(saved.path, tmp_path / "twice", *SHORT, "low_rank=0.6")
    with pytest.raises(ConfigError, match="prune first"):
        stages.prune(compose_config(f"checkpoint={saved.path}", "ratio=0.5", name="prune"), tmp_path / "pruned")
    for other in ("init=scratch", "optimizer_state=true"):
        with pytest.raises(ConfigError, match="exclude each other"):
            finetune(folder / "pruned/pruned.ckpt", tmp_path / "x", "low_rank=0.6", other)


@pytest.mark.parametrize(
    "splits",
    [
        [],
        {"feature.0": 1},
        {"feature.0": {"kind": "tucker", "ranks": [1, 10**9]}},
        {"x": {"kind": "svd", "ranks": [1]}},
    ],
)
def test_a_file_that_claims_impossible_factors_is_refused(splits, folder, tmp_path):
    content = checkpoint.read(folder / "pruned/pruned.ckpt").content
    content["slimming"]["low_rank"] = splits
    checkpoint.write(content, tmp_path / "damaged.ckpt")
    with pytest.raises(SlimmingError):
        slimming.load(tmp_path / "damaged.ckpt")


def test_double_precision_goes_through_all_stages(tmp_path):
    stages.train(compose_config(*SMALL, "trainer.precision=64-true", "trainer.max_epochs=1"), tmp_path / "a")
    options = (f"checkpoint={tmp_path}/a/last.ckpt", "ratio=0.3", "latency_batch=2", "calibrate.batches=2")
    stages.prune(compose_config(*options, name="prune"), tmp_path / "b")
    teacher = f"distill.teacher={tmp_path}/a/last.ckpt"
    finetune(tmp_path / "b/pruned.ckpt", tmp_path / "c", *SHORT, teacher, "epochs_by=macs")
    assert all(v.dtype == torch.float64 for v in state(tmp_path / "c").values() if v.is_floating_point())


def test_a_network_that_was_never_pruned_is_said_to_be(folder, tmp_path, capsys):
    finetune(folder / "sparse/last.ckpt", tmp_path, *SHORT)
    assert "was never pruned" in capsys.readouterr().out


def test_an_own_class_and_further_passes(folder, tmp_path):
    """Prune, fine-tune with the penalty, prune again, fine-tune: plans compose and each file loads on its own."""
    finetune(folder / "pruned/pruned.ckpt", tmp_path / "ft", "sparsity=0.01", *SHORT)
    options = (f"checkpoint={tmp_path}/ft/last.ckpt", "ratio=0.3", "latency_batch=0", "calibrate.batches=2")
    stages.prune(compose_config(*options, name="prune"), tmp_path / "p2")
    finetune(tmp_path / "p2/pruned.ckpt", tmp_path / "ft2", *SHORT)
    record = checkpoint.read(tmp_path / "ft2/last.ckpt").content["slimming"]
    assert len(record["plans"]) == 2
    slimming.load(tmp_path / "ft2/last.ckpt")(torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["init=random"], ConfigError, "init must be one of weights, scratch"),
        (["epochs_by=time"], ConfigError, "epochs_by must be one of epochs, macs"),
        (["distill.temperature=0"], ConfigError, "distill.temperature"),
        (["distill.alpha=2"], ConfigError, "distill.alpha"),
        (["distill.teacher=nowhere.ckpt"], CheckpointError, "there is no checkpoint nowhere.ckpt"),
        (["trainer.max_epochs=0"], ConfigError, "trainer.max_epochs"),
        (["init=scratch", "optimizer_state=true"], ConfigError, "exclude each other"),
        (["data=cifar100", "data.root=x"], ConfigError, "100.* was trained for"),
        (["sparsity=-1"], ConfigError, "sparsity"),
    ],
    ids=str,
)
def test_bad_values(overrides, error, words, folder, tmp_path):
    with pytest.raises(error, match=words):
        finetune(folder / "pruned/pruned.ckpt", tmp_path / "run", *overrides)
    assert not (tmp_path / "run" / "last.ckpt").exists()


@pytest.mark.parametrize(
    "started", [stages.finetune, lambda *a: stages.run_on_devices("finetune", *a)], ids=["stage", "run"]
)
def test_a_missing_checkpoint_is_recorded(started, tmp_path):
    with pytest.raises(CheckpointError):
        started(compose_config("checkpoint=nowhere.ckpt", name="finetune"), tmp_path / "run")
    record = result(tmp_path / "run")
    assert (record["status"], record["stage"]) == ("failed", "finetune")
    assert "there is no checkpoint nowhere.ckpt" in record["error"]


def test_a_trainer_without_epochs_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"trainer\.max_epochs is missing.* give trainer=default"):
        finetune(folder / "pruned/pruned.ckpt", tmp_path / "run", "trainer=one_device")
    assert "trainer.max_epochs is missing" in result(tmp_path / "run")["error"]


def test_a_teacher_of_other_classes_is_refused(folder, tmp_path):
    content = checkpoint.read(folder / "sparse/last.ckpt").content
    other = models.vgg(widths=[4], num_classes=7, in_channels=1)
    content["slimming"]["model"] = {"name": "vgg", "arguments": {"widths": [4], "num_classes": 7, "in_channels": 1}}
    content["state_dict"] = {f"model.{k}": v for k, v in other.state_dict().items()}
    checkpoint.write(content, tmp_path / "t.ckpt")
    with pytest.raises(ConfigError, match="knows 7 classes, the data have 10"):
        finetune(folder / "pruned/pruned.ckpt", tmp_path / "run", f"distill.teacher={tmp_path}/t.ckpt")


def test_a_detector_is_no_teacher_of_a_classifier(folder, tmp_path):
    arguments = {"width": 0.0625, "num_classes": 10, "in_channels": 1, "image_size": 32}
    dense = {"name": "yolov3_tiny", "arguments": arguments}
    slimming.save(tmp_path / "t.ckpt", models.yolov3_tiny(**arguments), dense=dense)
    with pytest.raises(ConfigError, match="is a detector, YoloV3Tiny, and this network is a classifier"):
        finetune(folder / "pruned/pruned.ckpt", tmp_path / "run", f"distill.teacher={tmp_path}/t.ckpt")


def test_a_plan_without_a_look_at_train_mode_is_not_fine_tuned(folder, tmp_path):
    content = checkpoint.read(folder / "pruned/pruned.ckpt").content
    content["slimming"]["plans"][0] |= {"train_watched": False, "train_reason": "targets are missing"}
    checkpoint.write(content, tmp_path / "x.ckpt")
    with pytest.raises(ConfigError, match=r"targets are missing.*train_input"):
        finetune(tmp_path / "x.ckpt", tmp_path / "run")


def test_a_recipe_from_a_file_names_known_classes_only(folder, tmp_path):
    content = checkpoint.read(folder / "pruned/pruned.ckpt").content
    content["slimming"]["config"]["optimizer"] = {"_target_": "os.system", "command": "true"}
    checkpoint.write(content, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="not built on a file's word alone"):
        finetune(tmp_path / "x.ckpt", tmp_path / "run")
    cfg = compose_config(f"checkpoint={tmp_path}/x.ckpt", "optimizer=sgd", name="finetune")
    assert finetuning.recipe_of(cfg, Record.from_dict(content["slimming"])).optimizer["_target_"] == "torch.optim.SGD"


def test_a_value_of_the_recipe_is_set_back_to_null(folder):
    record = checkpoint.read(folder / "pruned/pruned.ckpt").record
    record.config["trainer"] |= {"gradient_clip_val": 1.0}
    compose = lambda *overrides: compose_config("checkpoint=x", *overrides, name="finetune")  # noqa: E731
    assert finetuning.recipe_of(compose(), record).trainer["gradient_clip_val"] == 1.0
    null = finetuning.recipe_of(compose("trainer.gradient_clip_val=null"), record)
    assert null.trainer["gradient_clip_val"] is None and null.trainer["limit_train_batches"] == 4
