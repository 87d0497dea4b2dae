"""Checks of a composed configuration: each value against its declaration, then values against each other."""

from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from slimming.channels.options import check_penalty
from slimming.config.schema import (
    BenchConfig,
    ExportConfig,
    FinetuneConfig,
    PruneConfig,
    PruneOptions,
    QuantizeConfig,
    RepairConfig,
    ShrinkConfig,
    SlimConfig,
    TrainConfig,
    TrainOptions,
)
from slimming.errors import ConfigError, check_choice, check_number
from slimming.options import check_options

DEFAULT_RATIO = 0.5  # of slim.py, where no criterion is given
REPAIR_IMAGES = 2000  # that repair=true stands for
SHRINK_EPOCHS = 2  # that shrink=true stands for
CALIBRATION_BATCHES = 100  # where there is no repair, after which calibration takes more than it gives
NEEDS = {"global": ("ratio",), "per_layer": ("ratio",), "threshold": ("threshold",), "optimal": ()}
QUANTISABLE = ("onnx", "openvino")  # formats
ENGINES = ("torch", "compile", "onnxruntime", "openvino")  # of bench.py
NEEDS |= {"budget": ("budget.macs", "budget.params", "budget.latency")}  # one of them


def check(cfg: DictConfig) -> Any:
    """Turn a composed configuration into its dataclass and check it.

    Raises:
        ConfigError: a value out of range, or values that exclude each other.
    """
    config = OmegaConf.to_object(without_missing(cfg))
    if isinstance(config, SlimConfig) and not _given(config) and config.criterion is None:
        config.ratio = DEFAULT_RATIO
    check_options(config)
    if isinstance(config, PruneOptions):
        config.repair = _repair(config.repair)
        if config.calibrate.batches is None:
            config.calibrate.batches = 0 if config.repair else CALIBRATION_BATCHES
    if isinstance(config, TrainOptions):
        _check_steering(config)
        config.shrink = _shrink(config.shrink)
        _check_shrink(config)
    checks = ((TrainConfig, _check_train), (PruneOptions, _check_pruning), (PruneConfig, _check_prune))
    checks = (*checks, (FinetuneConfig, _check_finetune), (SlimConfig, _check_slim), (ExportConfig, _check_export))
    checks = (*checks, (BenchConfig, _check_bench))
    for kind, function in checks:
        if isinstance(config, kind):
            function(config)
    return config


def without_missing(cfg: DictConfig) -> DictConfig:
    """Return a configuration whose groups hold only values that were given: those of `checkpoint` groups are missing.

    So a value that is null was set to null.
    """
    cfg = cfg.copy()
    for name in [name for name in cfg if isinstance(name, str)]:
        node = None if OmegaConf.is_missing(cfg, name) else cfg[name]
        if isinstance(node, DictConfig) and OmegaConf.get_type(node) is dict:
            given = OmegaConf.to_container(node, resolve=True, throw_on_missing=False)
            cfg[name] = {key: value for key, value in given.items() if value != MISSING}
    return cfg


def _given(config: PruneOptions) -> dict[str, Any]:
    """Return the values that decide the criterion, by key: those that are given."""
    values = {"ratio": config.ratio, "threshold": config.threshold}
    values |= {f"budget.{key}": value for key, value in vars(config.budget).items()}
    return {key: value for key, value in values.items() if value is not None}


def criterion_name(config: PruneOptions) -> str:
    """Return which criterion the values ask for: global, per_layer, threshold, optimal or budget.

    Raises:
        ConfigError: none, or several.
    """
    values = _given(config)
    given = tuple(values)
    fits = [name for name, keys in NEEDS.items() if given in ((key,) for key in keys) or (not given and not keys)]
    name = config.criterion or next((f for f in fits if f != "optimal"), None)
    if name in fits:
        return name
    got = [f"criterion={config.criterion}"] * bool(config.criterion) + [f"{key}={values[key]}" for key in given]
    raise ConfigError(
        "give exactly one criterion: ratio=0.7 (of all channels; with criterion=per_layer of each layer's), "
        "budget.macs=0.5, budget.params=0.5 or budget.latency=0.5 (the share that may remain), threshold=1e-3, or "
        "criterion=optimal; "
        f"got {' and '.join(got) or 'none'}"
    )


def ratios(config: SlimConfig) -> list[float | None]:
    """Return the ratios to prune at; [None] where another criterion is asked for."""
    return config.ratio if isinstance(config.ratio, list) else [config.ratio]


def _repair(given: Any) -> RepairConfig | None:
    """Return what `repair` asks for; None where it is off, as in the configurations of versions without it."""
    if isinstance(given, bool):
        given = RepairConfig(images=REPAIR_IMAGES if given else 0)
    if not isinstance(given, RepairConfig):
        raise ConfigError(f"repair must be true, false, or repair.images=<how many>; got {given!r}")
    if not given.images and given != RepairConfig():
        raise ConfigError(f"repair.ridge={given.ridge:g} needs repair.images={REPAIR_IMAGES} beside it: repair is off")
    return given if given.images else None


def _shrink(given: Any) -> ShrinkConfig | None:
    """Return what `shrink` asks for; None where it is off, as in the configurations of versions without it."""
    if isinstance(given, bool):
        given = ShrinkConfig(epochs=SHRINK_EPOCHS if given else 0)
    if not isinstance(given, ShrinkConfig):
        raise ConfigError(f"shrink must be true, false, or shrink.epochs=<how many>; got {given!r}")
    if not given.epochs and given != ShrinkConfig():
        raise ConfigError(
            f"shrink.threshold and shrink.round_to need shrink.epochs={SHRINK_EPOCHS} beside them: shrink is off"
        )
    return given if given.epochs else None


def _check_shrink(config: TrainOptions) -> None:
    if not config.shrink:
        return
    if not config.sparsity:
        raise ConfigError(
            "shrink=true needs a penalty, which brings gammas near zero: give sparsity=1e-4 or more, or sparsity=auto"
        )
    trainer = config.trainer if isinstance(config, TrainConfig | FinetuneConfig) else {}
    for key in ("min_epochs", "min_steps"):
        if trainer.get(key):
            raise ConfigError(
                f"shrink=true and trainer.{key} exclude each other: shrinking ends one fit and begins another"
            )


def _check_steering(config: TrainOptions) -> None:
    steered = config.sparsity == "auto"
    if steered and isinstance(config, SlimConfig) and config.target_ratio is None:
        config.target_ratio = max((r for r in ratios(config) if r), default=None)
    if steered and config.target_ratio is None:
        raise ConfigError(
            "sparsity=auto needs target_ratio beside it: the share of the gammas to bring near zero, e.g. 0.7"
        )
    if steered and config.penalty.name == "polarization":
        raise ConfigError(
            "sparsity=auto is for penalty=l1, proximal or group: what share polarization brings to zero follows from "
            "penalty.t, (t + 2) / 4, more than from lambda"
        )
    if not steered and config.target_ratio is not None:
        raise ConfigError(
            f"target_ratio={config.target_ratio:g} is for sparsity=auto; sparsity={config.sparsity:g} is a fixed lambda"
        )


def _check_train(config: TrainConfig) -> None:
    check_number("trainer.max_epochs", config.trainer.get("max_epochs"), 1, whole=True)
    check_penalty(config.penalty)
    if config.resume and config.init_from:
        raise ConfigError(
            "resume=true and init_from exclude each other: resume goes on with the run directory's own run"
        )


def _check_pruning(config: PruneOptions) -> None:
    config.reduce = config.reduction
    if config.convention != "exact" and (config.ratio is None or config.criterion not in (None, "global")):
        raise ConfigError(f"convention={config.convention} is for a global ratio only")
    _check_latency(config)


def _check_latency(config: PruneOptions) -> None:
    share = config.budget.latency
    if share is None:
        for key in ("runtime", "latency_threads"):
            if (value := getattr(config, key)) is not None:
                raise ConfigError(
                    f"{key}={value} is for budget.latency: give budget.latency=0.5 beside it, or leave it out"
                )
        return
    if config.runtime is None:
        raise ConfigError(
            f"budget.latency={share:g} needs runtime=onnx (or torch, openvino) beside it: the engine that is to be so fast"
        )
    if not config.latency_batch:
        raise ConfigError(
            f"budget.latency={share:g} needs latency_batch >= 1, the images of a pass, got latency_batch=0"
        )
    if config.per != "channel":
        raise ConfigError(
            f"per={config.per} and budget.latency exclude each other: scores are compared by the milliseconds that they cost"
        )


def _check_prune(config: PruneConfig) -> None:
    if not config.checkpoint:
        raise ConfigError("checkpoint=<run directory>/last.ckpt is needed: the network to prune")
    if not config.inspect:
        criterion_name(config)
    devices = config.trainer.get("devices")
    if devices not in (None, 1, "1") and not (isinstance(devices, list) and len(devices) == 1):
        raise ConfigError(
            f"trainer.devices must be 1 (or a list of one device), got {devices}: pruning takes one device"
        )


def _check_finetune(config: FinetuneConfig) -> None:
    if not config.checkpoint:
        raise ConfigError("checkpoint=<run directory>/pruned.ckpt is needed: the network to fine-tune")
    if config.init == "scratch" and config.optimizer_state:
        raise ConfigError("init=scratch and optimizer_state=true exclude each other: fresh weights have no history")
    if config.low_rank is not None and (config.init == "scratch" or config.optimizer_state):
        other = "init=scratch" if config.init == "scratch" else "optimizer_state=true"
        raise ConfigError(f"low_rank and {other} exclude each other: the factors are made of the checkpoint's weights")
    if config.trainer.get("max_epochs") is not None:
        check_number("trainer.max_epochs", config.trainer["max_epochs"], 1, whole=True)


def _check_export(config: ExportConfig) -> None:
    if not config.checkpoint:
        raise ConfigError("checkpoint=<run directory>/pruned.ckpt is needed: the network to export")
    if not config.quantize.to and config.quantize != QuantizeConfig():
        raise ConfigError("quantize.<option> needs quantize=int8 beside it: the export stays in float")
    if config.quantize.to and config.format not in QUANTISABLE:
        raise ConfigError(
            f"quantize={config.quantize.to} is for format={' and format='.join(QUANTISABLE)}, not for {config.format}"
        )
    if config.format not in QUANTISABLE and (config.shape == "auto" or config.shape_from):
        given = f"shape_from={config.shape_from}" if config.shape_from else "shape=auto"
        raise ConfigError(f"{given} is for format={' and format='.join(QUANTISABLE)}, not for {config.format}")
    if config.shape_from and config.shape:
        raise ConfigError(
            f"shape_from and shape={config.shape} exclude each other: the one takes a shape, the other times"
        )
    if config.quantize.symmetric and config.format != "onnx":
        raise ConfigError(f"quantize.symmetric=true is for format=onnx, not for {config.format}")


def _check_bench(config: BenchConfig) -> None:
    if not config.models:
        raise ConfigError("models='[<a.ckpt>,<b.onnx>]' is needed: the files to time")
    if len(set(config.models)) < len(config.models):
        raise ConfigError(f"models={config.models} names a file twice")
    for key in ("batch", "threads"):
        value = getattr(config, key)
        numbers = value if isinstance(value, list) else [value]
        if not numbers or len(set(numbers)) < len(numbers):
            raise ConfigError(f"{key}={value} must be one number, or several different ones")
        setattr(config, key, numbers)
    if config.engines == []:
        raise ConfigError(f"engines=[] is empty: give some of {', '.join(ENGINES)}, or null")
    for name in config.engines or ():
        check_choice("each of engines", name, ENGINES)


def lists_for_commas(arguments: list[str], keys: tuple[str, ...]) -> list[str]:
    """Write `key=1` and `key=1,64`, which Hydra would take for a sweep without -m, as lists among a command's arguments."""
    if {"-m", "--multirun"} & set(arguments):
        return arguments
    pairs = [argument.partition("=") for argument in arguments]
    return [
        f"{key}=[{value}]" if key in keys and value not in ("", "null") and value[0] != "[" else f"{key}{sign}{value}"
        for key, sign, value in pairs
    ]


def _check_slim(config: SlimConfig) -> None:
    if config.shrink and config.ignore:
        raise ConfigError(
            f"shrink=true and ignore={config.ignore} exclude each other: of every penalised BatchNorm channels leave; "
            "give those to penalise by penalty.layers"
        )
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
