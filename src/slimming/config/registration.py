"""What Hydra is told: the schemas, the groups that stand for a checkpoint's values, and functions for YAML files."""

import contextlib
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from slimming.config.help import help_text
from slimming.config.schema import SCHEMAS, QuantizeConfig
from slimming.errors import SlimmingError
from slimming.folders import claim
from slimming.ranks import rank, started

CONFIGS = Path(__file__).parents[3] / "configs"
DISTRIBUTED = ("train", "finetune")  # stages that torchrun and srun may start once per device
INHERITED = ("model", "data", "optimizer", "scheduler", "trainer")  # groups that a checkpoint records


def register() -> None:
    """Register everything; again in the worker processes of a parallel sweep, which import slimming.config alone."""
    store = ConfigStore.instance()
    for name, schema in SCHEMAS.items():
        store.store(name=f"{name}_schema", node=schema)
    for group in INHERITED:
        store.store(group=group, name="checkpoint", node=dict.fromkeys(_keys(CONFIGS / group), MISSING))
    for name, to in (("none", None), ("int8", "int8")):  # as a group: quantize=int8 and quantize.max_drop=2 go together
        store.store(group="quantize", name=name, node=QuantizeConfig(to=to))
    OmegaConf.register_new_resolver("tag", tag, replace=True)
    # Cached: the jobs of a sweep take over what the sweep has resolved, on whichever machine they run.
    OmegaConf.register_new_resolver("started", started, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("at_least_one", lambda n: n or 1, replace=True)
    OmegaConf.register_new_resolver("tasks", lambda job, n: n or 1 if job in DISTRIBUTED else 1, replace=True)
    OmegaConf.register_new_resolver("record_folder", record_folder, replace=True)
    OmegaConf.register_new_resolver("options_help", lambda stage: help_text(SCHEMAS[stage]), replace=True)


def _keys(folder: Path) -> list[str]:
    """Return the keys of all files of a group: what may be given beside a checkpoint, so that typos fail at composition."""
    files = [OmegaConf.load(path) for path in sorted(folder.glob("*.yaml"))]
    return list(dict.fromkeys(str(key) for file in files for key in file if key not in ("defaults", "_partial_")))


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


register()
