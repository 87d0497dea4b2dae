"""What a run leaves beside its checkpoint: result.json, of a stage that fails as well; and what it does not say."""

import contextlib
import os
import platform
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from slimming.errors import RunDirectoryError, SlimmingError
from slimming.folders import claimed
from slimming.quiet import only_errors
from slimming.records import Result, finished
from slimming.stages.building import build
from slimming.training.tracking import Tracking


@dataclass
class OngoingStage:
    """A stage that is going on: its folder, what result.json will say, and its loggers."""

    out: Path
    result: Result
    tracking: Tracking

    @property
    def loggers(self) -> list[Logger]:
        """The loggers, opened when first asked for; they are told the configuration."""
        return self.tracking.loggers(self.result.config or {})


@contextlib.contextmanager
def recorded(out: Path, result: Result, loggers: dict[str, Any], parent: str | None) -> Iterator[OngoingStage]:
    """Hold the run directory and write result.json in the end, of a stage that fails as well; then close the loggers.

    Args:
        result: what is known from the start; the caller adds the rest.
        loggers: the group `logger` of the configuration.
        parent: the checkpoint that the stage begins with.

    Raises:
        RunDirectoryError: the directory is another run's, whose record stays as it is.
    """
    result.versions = versions()
    started = time.monotonic()
    with claimed(out), contextlib.ExitStack() as stack:
        done = finished(out)
        if done and done.get("stage") != result.stage:
            raise RunDirectoryError(f"{out} holds a finished run of {done.get('stage')}: give another hydra.run.dir")
        try:
            with quiet():
                tracking = stack.enter_context(Tracking(result.stage, loggers, out, parent, build))
                yield OngoingStage(out, result, tracking)
        except RunDirectoryError:  # what is recorded there is another run's
            raise
        except BaseException as error:
            result.error = cause(error)
            with contextlib.suppress(OSError):  # the failure itself is what must be told
                if not finished(out):
                    _write(result, out, started)
            raise
        result.status = "finished"
        _write(result, out, started)


def _write(result: Result, out: Path, started: float) -> None:
    if rank_zero():
        result.wall_time_s = time.monotonic() - started
        result.write(out)


def cause(error: BaseException) -> str:
    """Say in one line what ended a run."""
    if isinstance(error, SystemExit | KeyboardInterrupt):  # Lightning turns Ctrl-C into the first
        return "interrupted"
    return str(error) if isinstance(error, SlimmingError) else f"{type(error).__name__}: {error}"


def rank_zero() -> bool:
    """Return whether this process is the one that writes files and talks."""
    return getattr(rank_zero_only, "rank", 0) in (0, None)


def relative(path: str | None, out: Path) -> str | None:
    """Return a path as seen from the run directory, so that the record stays true when a tree of runs is moved."""
    return path and os.path.relpath(path, out)


def versions() -> dict[str, str]:
    names = ("slimming", "torch", "torchvision", "lightning")
    return {n: version(n) for n in names} | {"python": platform.python_version(), "machine": _machine()}


def _machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


@contextlib.contextmanager
def quiet():
    """Keep Lightning's notes on itself and on settings that are meant so off the screen."""
    loggers = ("lightning.pytorch", "lightning.fabric", "lightning", "matplotlib")
    with warnings.catch_warnings(), only_errors(*loggers):
        for message in (
            ".*does not have many workers.*",  # batches come from memory
            ".*isinstance.treespec, LeafSpec.*",
            ".*LightningModule.*checkpoint.*",
            "Checkpoint directory .* exists.*",
            ".*logging interval.*",
            ".*lr_scheduler.step.*before.*optimizer.step.*",  # GradScaler skipped the first step
        ):
            warnings.filterwarnings("ignore", message)
        yield
