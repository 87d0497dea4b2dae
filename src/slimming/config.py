"""The schema of the top-level configuration and its range checks.

Imported by the entries before anything heavy: no torch, no lightning here.
"""

import contextlib
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from slimming.errors import ConfigError, SlimmingError, check_choice, check_number
from slimming.folders import claim
from slimming.ranks import rank, started


@dataclass
class PenaltyConfig:
    """Which gammas are penalised: shell patterns of BatchNorm layer names; None: all that are trainable."""

    layers: list[str] | None = None


@dataclass
class TrainConfig:
    """One training. The groups (model ... trainer) are open here: their `_target_`'s signature is their schema."""

    model: dict[str, Any] = MISSING
    data: dict[str, Any] = MISSING
    optimizer: dict[str, Any] = MISSING
    scheduler: dict[str, Any] = MISSING
    trainer: dict[str, Any] = MISSING
    logger: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    sparsity: float = 1e-4
    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)
    decay_batchnorm: bool = True
    channels_last: bool = True
    compile: bool = False
    sync_batchnorm: bool = False
    seed: int = 1
    resume: bool = False
    init_from: str | None = None


@dataclass
class BudgetConfig:
    """The share of the dense cost that may remain, in (0, 1]; one of the two."""

    macs: float | None = None
    params: float | None = None


@dataclass
class CalibrateConfig:
    """How many training batches the BatchNorm statistics are re-estimated on after pruning; 0: not at all."""

    batches: int = 100


@dataclass
class PruneOptions:
    """What to remove, and what to do then."""

    criterion: str | None = None
    ratio: float | None = None
    threshold: float | None = None
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    delta: float = 1e-3
    convention: str = "exact"
    ties: str = "together"
    min_channels: int = 1
    max_layer_ratio: float = 1.0
    round_to: int = 1
    ignore: list[str] = field(default_factory=list)
    reduce: str = "max"
    score: str = "gamma"
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    test: bool = True
    latency_batch: int = 64


@dataclass
class PruneConfig(PruneOptions):
    """One pruning. In the groups, None stands for the value of the checkpoint's training."""

    checkpoint: str | None = None
    seed: int = 1
    inspect: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)


@dataclass
class DistillConfig:
    """Learning from a teacher, a checkpoint of any stage; None: no teacher."""

    teacher: str | None = None
    temperature: float = 4.0
    alpha: float = 0.9


@dataclass
class FinetuneConfig:
    """One fine-tuning. None, also in the groups, stands for the value of the checkpoint's training."""

    checkpoint: str | None = None
    init: str = "weights"
    epochs_by: str = "epochs"
    optimizer_state: bool = False
    distill: DistillConfig = field(default_factory=DistillConfig)
    sparsity: float = 0.0
    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)
    decay_batchnorm: bool | None = None
    channels_last: bool | None = None
    compile: bool = False
    sync_batchnorm: bool = False
    seed: int | None = None
    resume: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)


@dataclass
class TuneConfig:
    """The fine-tuning within `slim`; None: as the sparse training."""

    max_epochs: int | None = None
    lr: float | None = None
    distill: bool = False
    scratch: bool = False


@dataclass
class SlimConfig(TrainConfig, PruneOptions):
    """The whole pipeline: a training's values, a pruning's, and how often."""

    ratio: Any = None
    passes: int = 1
    baseline: bool = False
    finetune: TuneConfig = field(default_factory=TuneConfig)


@dataclass
class ReportConfig:
    """A report on the runs below a folder; out None: into that folder."""

    runs: str = "runs"
    out: str | None = None


DEFAULT_RATIO = 0.5  # of slim.py, where no criterion is given
DISTRIBUTED = ("train", "finetune")  # stages that torchrun and srun may start once per device
NEEDS = {"global": ("ratio",), "per_layer": ("ratio",), "threshold": ("threshold",), "optimal": ()}
NEEDS |= {"budget": ("budget.macs", "budget.params")}  # one of them


def criterion_name(config: PruneOptions) -> str:
    """Return which criterion the values ask for: global, per_layer, threshold, optimal or budget.

    Raises:
        ConfigError: none, or several.
    """
    values = {"ratio": config.ratio, "threshold": config.threshold}
    values |= {"budget.macs": config.budget.macs, "budget.params": config.budget.params}
    given = tuple(key for key, value in values.items() if value is not None)
    if config.criterion is not None:
        check_choice("criterion", config.criterion, NEEDS)
    fits = [name for name, keys in NEEDS.items() if given in ((key,) for key in keys) or (not given and not keys)]
    name = config.criterion or next((f for f in fits if f != "optimal"), None)
    if name in fits:
        return name
    got = [f"criterion={config.criterion}"] * bool(config.criterion) + [f"{key}={values[key]}" for key in given]
    raise ConfigError(
        "give exactly one criterion: ratio=0.7 (of all channels; with criterion=per_layer of each layer's), "
        "budget.macs=0.5 or budget.params=0.5 (the share that may remain), threshold=1e-3, or criterion=optimal; "
        f"got {' and '.join(got) or 'none'}"
    )


def tag(name: str, value: Any) -> str:
    """Name a value in a folder's name: `_ratio-0.3`, nothing for None; no `=` or comma, which Hydra could not read back."""
    if value is None:
        return ""
    return f"_{name}-{value:g}" if isinstance(value, int | float) else f"_{name}-{value}"


def record_folder(name: str, out: str | None) -> str | None:
    """Return where in a run directory Hydra writes its record: nowhere on other ranks, nor in another run's directory.

    Claims the directory until `folders.release`: Hydra writes before any code of ours runs.

    Args:
        out: the run directory, None while there is none (--cfg).
    """
    if rank() > 0:
        return None
    with contextlib.suppress(SlimmingError):  # the stage will say it
        if out is not None:
            claim(Path(out))
        return name
    return None


def register() -> None:
    """Tell Hydra the schemas that the YAML files in configs/ start from."""
    schemas = {"train": TrainConfig, "prune": PruneConfig, "finetune": FinetuneConfig, "report": ReportConfig}
    schemas |= {"slim": SlimConfig}
    for name, schema in schemas.items():
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    OmegaConf.register_new_resolver("tag", tag, replace=True)
    # Cached: the jobs of a sweep take over what the sweep has resolved, on whichever machine they run.
    OmegaConf.register_new_resolver("started", started, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("at_least_one", lambda n: n or 1, replace=True)
    OmegaConf.register_new_resolver("tasks", lambda job, n: n or 1 if job in DISTRIBUTED else 1, replace=True)
    OmegaConf.register_new_resolver("record_folder", record_folder, replace=True)


def check(cfg: DictConfig) -> Any:
    """Turn a composed configuration into its dataclass and check the ranges of the top level.

    Raises:
        ConfigError: a value out of range, or values that exclude each other.
    """
    config = OmegaConf.to_object(cfg)
    if getattr(config, "seed", None) is not None:
        check_number("seed", config.seed, 0, 2**32 - 1, whole=True)
    checks = ((TrainConfig, _check_train), (PruneConfig, _check_prune), (FinetuneConfig, _check_finetune))
    for kind, function in (*checks, (SlimConfig, _check_slim)):
        if isinstance(config, kind):
            function(config)
    return config


def _check_train(config: TrainConfig) -> None:
    check_number("sparsity", config.sparsity, 0)
    check_number("trainer.max_epochs", config.trainer.get("max_epochs"), 1, whole=True)
    if config.resume and config.init_from:
        raise ConfigError(
            "resume=true and init_from exclude each other: resume goes on with the run directory's own run"
        )


def _check_prune(config: PruneConfig) -> None:
    if not config.checkpoint:
        raise ConfigError("checkpoint=<run directory>/last.ckpt is needed: the network to prune")
    if not config.inspect:
        criterion_name(config)
    _check_options(config)
    devices = config.trainer.get("devices")
    if devices not in (None, 1, "1") and not (isinstance(devices, list) and len(devices) == 1):
        raise ConfigError(
            f"trainer.devices must be 1 (or a list of one device), got {devices}: pruning takes one device"
        )


def _check_options(config: PruneOptions) -> None:
    check_choice("ties", config.ties, ("together", "apart"))
    check_choice("reduce", config.reduce, ("max", "mean"))
    check_choice("score", config.score, ("gamma", "random", "weight_l1"))
    check_choice("convention", config.convention, ("exact", "reference"))
    check_number("min_channels", config.min_channels, 1, whole=True)
    check_number("round_to", config.round_to, 1, whole=True)
    check_number("max_layer_ratio", config.max_layer_ratio, 0, 1, above=True)
    check_number("delta", config.delta, 0, 1)
    if config.threshold is not None:
        check_number("threshold", config.threshold, 0)
    for key in ("macs", "params"):
        if getattr(config.budget, key) is not None:
            check_number(f"budget.{key}", getattr(config.budget, key), 0, 1, above=True)
    for ratio in config.ratio if isinstance(config.ratio, list) else [config.ratio]:
        if ratio is not None:
            check_number("ratio", ratio, 0, 1, below=True)
    if config.convention != "exact" and (config.ratio is None or config.criterion not in (None, "global")):
        raise ConfigError(f"convention={config.convention} is for a global ratio only")
    check_number("calibrate.batches", config.calibrate.batches, 0, whole=True)
    check_number("latency_batch", config.latency_batch, 0, whole=True)


def _check_finetune(config: FinetuneConfig) -> None:
    if not config.checkpoint:
        raise ConfigError("checkpoint=<run directory>/pruned.ckpt is needed: the network to fine-tune")
    check_number("sparsity", config.sparsity, 0)
    check_choice("init", config.init, ("weights", "scratch"))
    check_choice("epochs_by", config.epochs_by, ("epochs", "macs"))
    if config.init == "scratch" and config.optimizer_state:
        raise ConfigError("init=scratch and optimizer_state=true exclude each other: fresh weights have no history")
    if config.trainer.get("max_epochs") is not None:
        check_number("trainer.max_epochs", config.trainer["max_epochs"], 1, whole=True)
    check_number("distill.temperature", config.distill.temperature, 0, above=True)
    check_number("distill.alpha", config.distill.alpha, 0, 1)


def ratios(config: SlimConfig) -> list[float | None]:
    """Return the ratios to prune at; [None] where another criterion is asked for."""
    return config.ratio if isinstance(config.ratio, list) else [config.ratio]


def _check_slim(config: SlimConfig) -> None:
    check_number("passes", config.passes, 1, whole=True)
    given = (config.criterion, config.ratio, config.threshold, config.budget.macs, config.budget.params)
    if all(value is None for value in given):
        config.ratio = DEFAULT_RATIO
    _check_options(config)
    if config.ratio == []:
        raise ConfigError("ratio=[] is empty: give one or more shares in [0, 1)")
    if len(set(ratios(config))) < len(ratios(config)):
        raise ConfigError(f"ratio={config.ratio} names a share twice")
    if config.passes > 1 and len(ratios(config)) > 1:
        raise ConfigError(f"ratio={config.ratio} with passes={config.passes}: several passes take one ratio")
    if config.passes > 1 and not config.sparsity:
        raise ConfigError("passes > 1 needs sparsity > 0: every further pass sparsifies the thin network again")
    if config.resume or config.init_from:
        raise ConfigError(
            "slim.py goes on by itself where it stopped: give the same hydra.run.dir, not resume or init_from"
        )
    criterion_name(config)
    if config.finetune.max_epochs is not None:
        check_number("finetune.max_epochs", config.finetune.max_epochs, 1, whole=True)
    if config.finetune.lr is not None:
        check_number("finetune.lr", config.finetune.lr, 0, above=True)


def plain(config: Any) -> dict:
    """Return a configuration dataclass as plain dicts and lists."""
    return dataclasses.asdict(config)


register()  # also in the worker processes of a parallel sweep, which import this module and nothing else of ours
