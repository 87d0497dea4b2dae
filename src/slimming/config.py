"""The schema of the top-level configuration and its range checks.

Imported by the entries before anything heavy: no torch, no lightning here.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from slimming.errors import ConfigError, check_number


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
    seed: int = 1
    resume: bool = False
    init_from: str | None = None


def register() -> None:
    """Tell Hydra the schemas that the YAML files in configs/ start from."""
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)


def check(cfg: DictConfig) -> TrainConfig:
    """Turn a composed configuration into its dataclass and check the ranges of the top level.

    Raises:
        ConfigError: a value out of range, or values that exclude each other.
    """
    config: TrainConfig = OmegaConf.to_object(cfg)
    check_number("sparsity", config.sparsity, 0)
    check_number("seed", config.seed, 0, 2**32 - 1, whole=True)
    check_number("trainer.max_epochs", config.trainer.get("max_epochs"), 1, whole=True)
    if config.resume and config.init_from:
        raise ConfigError(
            "resume=true and init_from exclude each other: resume goes on with the run directory's own run"
        )
    return config


def plain(config: Any) -> dict:
    """Return a configuration dataclass as plain dicts and lists."""
    return dataclasses.asdict(config)
