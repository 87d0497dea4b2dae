"""What the command line accepts, and what every shipped YAML file composes to."""

import dataclasses
import inspect
from typing import Any

import pytest
from hydra.errors import ConfigCompositionException
from hydra.utils import get_object

from conftest import ROOT, compose_config
from slimming import config
from slimming.config.checks import NEEDS
from slimming.config.help import help_text, rows
from slimming.errors import ConfigError

CONFIGS = ROOT / "configs"
GROUPS = ("model", "data", "optimizer", "scheduler", "trainer")
FILES = [(group, path.stem) for group in GROUPS for path in sorted((CONFIGS / group).glob("*.yaml"))]
FILES = [f for f in FILES if f[1] != "checkpoint"]
EXPERIMENTS = sorted(str(p.relative_to(CONFIGS / "experiment"))[:-5] for p in (CONFIGS / "experiment").rglob("*.yaml"))
EXPERIMENTS.remove("demo")  # of slim.py


@pytest.mark.parametrize(("group", "name"), FILES)
def test_every_group_file_fits_the_signature_of_its_target(group, name):
    base = ("checkpoint=a.ckpt", "inspect=true") if name == "one_device" else ()
    node = getattr(compose_config(*base, f"{group}={name}", name="prune" if base else "train"), group)
    parameters = inspect.signature(get_object(node["_target_"])).parameters
    known = set(parameters)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for base in get_object(node["_target_"]).__mro__:
            known |= set(inspect.signature(base.__init__).parameters)
    assert {k for k in node if k not in ("_target_", "_partial_")} <= known


@pytest.mark.parametrize("group", ["data", "optimizer", "scheduler", "trainer"])
def test_beside_a_checkpoint_nothing_is_given_but_what_is_typed(group):
    overrides = [f"{g}.{k}={v}" for g, k, v in GIVEN]
    assert getattr(compose_config("checkpoint=a.ckpt", name="finetune"), group) == {}
    given = getattr(compose_config("checkpoint=a.ckpt", *overrides, name="finetune"), group)
    assert given == {k: None if v == "null" else v for g, k, v in GIVEN if g == group}  # null is a value, too


@pytest.mark.parametrize("stage", ["train", "slim", "finetune"])
def test_every_penalty_is_a_file_that_names_it(stage):
    from slimming.channels.penalties import PENALTIES, Polarization

    base = ["checkpoint=a.ckpt"] * (stage == "finetune")
    assert {path.stem for path in (CONFIGS / "penalty").glob("*.yaml")} == set(PENALTIES)
    for name in PENALTIES:
        penalty = compose_config(*base, f"penalty={name}", "penalty.layers=[layer1.*]", name=stage).penalty
        t = inspect.signature(Polarization).parameters["t"].default if name == "polarization" else None
        assert (penalty.name, penalty.layers, penalty.t) == (name, ["layer1.*"], t)
    default = compose_config(*base, name=stage).penalty
    assert (default.name, default.layers, default.t) == (None if base else "l1", None, None)


GIVEN = [("data", "batch_size", 8), ("optimizer", "lr", 0.5), ("optimizer", "betas", "null"), ("scheduler", "T_max", 3)]
GIVEN += [("trainer", "max_epochs", 3), ("trainer", "gradient_clip_val", "null")]


@pytest.mark.parametrize("key", ["optimizer.lrr", "trainer.device", "data.batchsize", "distil.alpha"])
def test_typos_beside_a_checkpoint_are_refused_at_composition(key):
    with pytest.raises(ConfigCompositionException):
        compose_config("checkpoint=a.ckpt", f"{key}=1", name="finetune")


def test_every_option_says_what_it_means():
    for stage, schema in config.SCHEMAS.items():
        groups = {f.name for f in dataclasses.fields(schema) if f.type == dict[str, Any]}
        keys = [row.key for row in rows(schema)]
        assert {k.split(".")[0] for k in keys} == {f.name for f in dataclasses.fields(schema)} - groups, stage
        assert len(set(keys)) == len(keys) and all(row.meaning for row in rows(schema))
        assert all(f"{key}=" in help_text(schema) for key in keys)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["ratio=0.5"], "global"),
        (["ratio=0", "criterion=global"], "global"),
        (["ratio=0.5", "criterion=per_layer"], "per_layer"),
        (["threshold=0"], "threshold"),
        (["budget.macs=0.5"], "budget"),
        (["budget.params=0.5", "criterion=budget"], "budget"),
        (["criterion=optimal", "delta=0.1"], "optimal"),
        (["inspect=true"], None),
        ([], "got none"),
        (["ratio=0.5", "threshold=0.1"], "got ratio=0.5 and threshold=0.1"),
        (["budget.macs=0.5", "budget.params=0.5"], "got budget.macs=0.5 and budget.params=0.5"),
        (["criterion=optimal", "ratio=0.5"], "got criterion=optimal and ratio=0.5"),
        (["criterion=per_layer"], "got criterion=per_layer"),
        (["criterion=per_layer", "threshold=0.1"], "got criterion=per_layer and threshold=0.1"),
        (["criterion=best"], "criterion must be one of global, per_layer, threshold, optimal, budget; got 'best'"),
    ],
    ids=str,
)
def test_pruning_takes_exactly_one_criterion(overrides, expected):
    if expected in (*NEEDS, None):
        cfg = compose_config("checkpoint=a.ckpt", *overrides, name="prune")
        assert expected is None or config.criterion_name(cfg) == expected
    else:
        with pytest.raises(ConfigError, match=expected):
            compose_config("checkpoint=a.ckpt", *overrides, name="prune")


def test_names_of_folders_hold_rounded_numbers_and_nothing_that_hydra_reads():
    assert [config.tag("ratio", v) for v in (0.1 + 0.2, None, 1e-5, 3)] == [
        "_ratio-0.3",
        "",
        "_ratio-1e-05",
        "_ratio-3",
    ]


PAPER = {  # Liu et al., section 4.3: epochs, batch, drops of the rate, lambda
    "vgg19_cifar10": (160, 64, [0.5, 0.75], 1e-4),
    "vgg19_cifar100": (160, 64, [0.5, 0.75], 1e-4),
    "vgg19_svhn": (20, 64, [0.5, 0.75], 1e-4),
    "preresnet164_cifar10": (160, 64, [0.5, 0.75], 1e-5),
    "preresnet164_cifar100": (160, 64, [0.5, 0.75], 1e-5),
    "preresnet164_svhn": (20, 64, [0.5, 0.75], 1e-5),
    "densenet40_cifar10": (160, 64, [0.5, 0.75], 1e-5),
    "densenet40_cifar100": (160, 64, [0.5, 0.75], 1e-5),
    "densenet40_svhn": (20, 64, [0.5, 0.75], 1e-5),
    "mlp_mnist": (30, 256, [0.3334, 0.6667], 1e-4),  # lambda is ours
}


@pytest.mark.parametrize("name", PAPER)
def test_an_experiment_named_after_the_paper_follows_it(name):
    cfg = compose_config(f"experiment=paper/{name}")
    epochs, batch, drops, sparsity = PAPER[name]
    assert (cfg.trainer["max_epochs"], cfg.data["batch_size"], cfg.sparsity) == (epochs, batch, sparsity)
    assert (cfg.scheduler["milestones"], cfg.scheduler["gamma"], cfg.scheduler["max_epochs"]) == (drops, 0.1, epochs)
    sgd = cfg.optimizer
    assert (sgd["lr"], sgd["momentum"], sgd["nesterov"], sgd["weight_decay"]) == (0.1, 0.9, True, 1e-4)
    assert sgd.get("dampening", 0) == 0 and cfg.model.get("gamma_init", 0.5) == 0.5 and cfg.decay_batchnorm
    model = get_object(cfg.model["_target_"])
    assert inspect.signature(model).parameters["gamma_init"].default == 0.5


def test_every_experiment_of_the_paper_is_pinned():
    assert {f"paper/{name}" for name in PAPER} == {name for name in EXPERIMENTS if name.startswith("paper/")}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_overrides_the_defaults(name):
    default, cfg = compose_config(), compose_config(f"experiment={name}")
    text = (CONFIGS / "experiment" / f"{name}.yaml").read_text()
    expected = [line.split(":")[1].strip() for line in text.splitlines() if line.startswith("sparsity:")]
    assert [float(e) for e in expected] == [cfg.sparsity]
    assert (cfg.model, cfg.data, cfg.sparsity, cfg.trainer) != (
        default.model,
        default.data,
        default.sparsity,
        default.trainer,
    ) or name == "paper/vgg19_cifar10"


def test_the_command_line_overrides_an_experiment():
    assert compose_config("experiment=paper/mlp_mnist", "sparsity=0.5").sparsity == 0.5


def test_the_default_is_the_papers_recipe():
    cfg = compose_config()
    assert (cfg.model["depth"], cfg.sparsity, cfg.data["batch_size"], cfg.trainer["max_epochs"]) == (19, 1e-4, 64, 160)
    sgd, schedule = cfg.optimizer, cfg.scheduler
    assert (sgd["lr"], sgd["momentum"], sgd["weight_decay"]) == (0.1, 0.9, 1e-4)
    assert (schedule["milestones"], schedule["gamma"], schedule["max_epochs"]) == ([0.5, 0.75], 0.1, 160)


ABSENT = ["sparsty=1", "trainer.device=2", "model=vgg12", "data=imagenet21k", "model.widht=2"]
ABSENT += ["penalty=l2", "penalty.s=1", "penalty.layers=a", "penalty.t=high"]


@pytest.mark.parametrize("override", ABSENT)
def test_what_does_not_exist_is_refused_at_composition(override):
    with pytest.raises(ConfigCompositionException):
        compose_config(override)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sparsity=-1"], "sparsity must be auto or a number >= 0, got -1"),
        (["sparsity=nan"], "sparsity .* got nan"),
        (["seed=-3"], "seed .* got -3"),
        (["trainer.max_epochs=0"], "trainer.max_epochs .* got 0"),
        (["trainer.max_epochs=null"], "trainer.max_epochs .* got None"),
        (["resume=true", "init_from=a.ckpt"], "exclude each other"),
        (["penalty.name=l2"], "penalty.name must be one of l1, proximal, polarization, group; got 'l2'"),
        (["penalty=polarization", "penalty.t=3"], "penalty.t must be a number >= -2 and <= 2, got 3.0"),
        (["penalty=group", "penalty.t=1"], "penalty.t=1 is of penalty=polarization, and this is penalty=group"),
    ],
)
def test_values_out_of_range_are_named(overrides, words):
    with pytest.raises(ConfigError, match=words):
        compose_config(*overrides)
