"""Running a training in as many processes as it has devices on this machine."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from slimming import checkpoint
from slimming.config import SCHEMAS, FinetuneConfig, TrainConfig, plain
from slimming.errors import ConfigError, RunDirectoryError
from slimming.folders import claimed, joined
from slimming.ranks import started_externally
from slimming.records import finished, write_failure
from slimming.stages.building import build, inherit
from slimming.stages.finetuning import finetune
from slimming.stages.precision import AUTO, settled
from slimming.stages.recording import cause, quiet
from slimming.stages.resuming import LAST
from slimming.stages.tasks import task_of
from slimming.stages.training import train
from slimming.training import launcher

DISTRIBUTED: dict[str, Callable[[Any, Path], float]] = {"train": train, "finetune": finetune}


def run_on_devices(stage: str, cfg: TrainConfig | FinetuneConfig, out: Path) -> float:
    """Run `train` or `finetune` in this process, or in one process per device if there are several.

    Returns:
        What the stage returns: the test accuracy, or a detector's mAP@0.5.

    Raises:
        SlimmingError: of the stage, whichever rank raised it first.
    """
    with claimed(out):
        with _failure_recorded(out, stage):
            processes = 1 if started_externally() else _processes(_trainer(cfg))
            if processes > 1:
                if cfg.trainer.get("precision") == AUTO:  # once, for all ranks
                    given = settled(_trainer(cfg), out / LAST)["precision"]
                    cfg = dataclasses.replace(cfg, trainer=cfg.trainer | {"precision": given})
                job = {"stage": stage, "config": plain(cfg), "out": str(out)}
                launcher.start_ranks(job, processes)
        if processes == 1:
            return DISTRIBUTED[stage](cfg, out)
        result = finished(out)
    return result["metrics"].get(f"test/{task_of(result['config']).score}", math.nan) if result else math.nan


@contextlib.contextmanager
def _failure_recorded(out: Path, stage: str) -> Iterator[None]:
    try:
        yield
    except RunDirectoryError:  # what is recorded there is another run's
        raise
    except BaseException as error:
        write_failure(out, stage, cause(error))
        raise


def run_rank(job_folder: Path) -> None:
    """Be one rank of the job that `launcher.start_ranks` has described in a folder."""
    launcher.run_rank(job_folder, run_job)


def run_job(job: dict) -> None:
    """Do one rank's part of a job that `run_on_devices` has described."""
    schema = OmegaConf.structured(SCHEMAS[job["stage"]])
    cfg = OmegaConf.to_object(OmegaConf.merge(schema, job["config"]))
    with joined(Path(job["out"])):
        DISTRIBUTED[job["stage"]](cfg, Path(job["out"]))


def _trainer(cfg: TrainConfig | FinetuneConfig) -> dict:
    if isinstance(cfg, TrainConfig):
        return cfg.trainer
    record = checkpoint.read(cfg.checkpoint).record.need(cfg.checkpoint, "config")
    return inherit("trainer", cfg.trainer, (record.config or {}).get("trainer"))


def _processes(trainer: dict) -> int:
    """Return how many processes this machine is asked for.

    Raises:
        ConfigError: more devices than there are, or several nodes without a launcher that starts processes on each.
    """
    nodes = trainer.get("num_nodes") or 1
    if nodes != 1:
        raise ConfigError(
            f"trainer.num_nodes={nodes} needs a launcher that starts processes on every node: "
            "torchrun --nnodes=2 --nproc_per_node=4 train.py ..., or srun python train.py ... in a SLURM job"
        )
    if trainer.get("devices") in (None, 1, "1"):
        return 1
    asked = {k: trainer[k] for k in ("_target_", "accelerator", "devices") if k in trainer}
    with quiet():
        probe = build("trainer", asked, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    kind, count = type(probe.accelerator).__name__, probe.num_devices
    if kind == "CPUAccelerator" and count > (cores := os.cpu_count() or 1):
        raise ConfigError(f"trainer.devices={trainer['devices']}: this machine has no GPU for it and {cores} CPU cores")
    return count
