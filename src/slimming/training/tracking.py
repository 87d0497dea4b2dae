"""Where a run can be followed: TensorBoard, Weights & Biases, MLflow, with all stages of a chain in one group.

A run is worth more than its log. A package that is not installed or a wrong value is an error before anything is trained. What
goes wrong later (a server that is gone, a full disk) is reported in one line, that logger gets no further calls, and the run
goes on: metrics.csv and result.json hold everything that loggers get.
"""

import contextlib
import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only

from slimming.errors import ConfigError
from slimming.files import write_text
from slimming.records import RESULT

FIGURES = ("curves.png", "gammas.png", "widths.png")
IDS = "tracking.json"  # logger -> the id of its run, so that a resumed stage goes on in the same one
PACKAGES = {  # class of a logger -> the extra that installs it, and packages of which it needs one
    "TensorBoardLogger": ("tensorboard", ("tensorboard", "tensorboardX")),
    "WandbLogger": ("wandb", ("wandb",)),
    "MLFlowLogger": ("mlflow", ("mlflow",)),
}
GUARDED = ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize", "after_save_checkpoint")
BINS = 64  # of a histogram
LONGEST_CHAIN = 100  # stages; records that name each other in a circle must end, too
LONGEST_GROUP = 128  # characters; Weights & Biases takes no more

Build = Callable[[str, dict], Any]


class Tracking(contextlib.AbstractContextManager):
    """The loggers of one stage; on leaving it, they get the files and final metrics that the stage has left, and are closed.

    It is left after result.json has been written.

    A stage that fails before it has asked for the loggers leaves nothing in them; one that never asks is not tracked.

    Args:
        stage: `train`, `prune` or `finetune`.
        nodes: the `logger` group of the configuration: name -> {_target_, arguments}.
        out: the stage's run directory.
        parent: the checkpoint that the stage starts from, or None.
        build: ("logger.wandb", {_target_, arguments}) -> the logger; ConfigError for wrong values.

    Raises:
        ConfigError: a logger's package is not installed.
    """

    def __init__(self, stage: str, nodes: dict[str, dict], out: Path, parent: str | None, build: Build):
        check_packages(nodes)
        self.stage, self.nodes, self.out, self.parent, self.build = stage, nodes, out, parent, build
        self._opened: list[Logger] | None = None

    def loggers(self, config: dict[str, Any]) -> list[Logger]:
        """Open the loggers at the first call; on all ranks but the first they do nothing.

        Raises:
            ConfigError: a logger cannot be built with its values.
        """
        if self._opened is None and getattr(rank_zero_only, "rank", 0):
            self._opened = [DummyLogger() for _ in self.nodes]
        elif self._opened is None:
            group = group_of(self.out, self.parent)
            self._opened = open_loggers(self.stage, self.nodes, self.out, group, self.build, config)
        return self._opened

    def __exit__(self, kind, error, trace) -> None:
        track(self._opened or [], self.out)
        close(self._opened or [], failed=kind is not None)


def check_packages(nodes: dict[str, dict]) -> None:
    """Raise ConfigError, naming the extra to install, if a logger's package is missing."""
    for key, node in nodes.items():
        extra, packages = PACKAGES.get(_kind(node), ("", ()))
        if packages and not any(map(_installed, packages)):
            raise ConfigError(f"logger={key} needs the package {packages[0]}: pip install 'slimming[{extra}]'")


def _installed(package: str) -> bool:
    found = find_spec(package)
    return (
        found is not None and found.origin is not None
    )  # a folder ./wandb with runs passes for a package without origin


def _kind(node: dict) -> str:
    return str(node.get("_target_")).rpartition(".")[2]


# --- names ------------------------------------------------------------------------------------------------------------


def group_of(out: Path, parent: str | None) -> str:
    """Name the chain of stages that a run directory belongs to: by the run directory in which the first of them ran.

    `runs/train/vgg19_cifar10/2026-11-22_07-41-39` gives `vgg19_cifar10_2026-11-22_07-41-39`; the stages of slim.py share
    the folder that slim.py was started in.

    Args:
        parent: the checkpoint that the stage in `out` starts from; further back, each result.json names its own.
    """
    first = out.absolute()
    for _ in range(LONGEST_CHAIN):
        before = Path(os.path.abspath(parent)).parent if parent else None
        if (
            before is None or not (before / RESULT).exists()
        ):  # not a stage of ours: a file of a reference implementation
            break
        first, parent = before, None
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a record that cannot be read ends the chain
            named = json.loads((before / RESULT).read_text()).get("parent")
            parent = named and str(before / named)
    return "_".join(_run_directory(first).parts[-2:]).replace("/", "")[-LONGEST_GROUP:]


def _run_directory(folder: Path) -> Path:
    """Return the folder that Hydra was started in; slim.py has its stages up to three levels below it."""
    return next((f for f in (folder, *folder.parents[:3]) if (f / ".hydra").is_dir()), folder)


def _name(out: Path) -> str:
    """Name a run within its group: `ratio-0.5/pruned` for a stage of slim.py, else the run directory's own name."""
    inside = out.absolute().relative_to(_run_directory(out.absolute())).as_posix()
    return out.absolute().name if inside == "." else inside


# --- from the configuration to loggers --------------------------------------------------------------------------------


def open_loggers(
    stage: str, nodes: dict[str, dict], out: Path, group: str, build: Build, config: dict[str, Any]
) -> list[Logger]:
    """Build the loggers of a stage and start, or go on with, their runs; one that cannot start is replaced by an empty one.

    Raises:
        ConfigError: a logger cannot be built with its values.
    """
    known: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        known = dict(json.loads((out / IDS).read_text()))
    loggers, ids = [], dict(known)
    for key, node in nodes.items():
        filled = _filled(stage, node, out, group, known.get(key))
        try:
            logger = build(f"logger.{key}", filled)
            _ = logger.experiment  # starts the run
        except Exception as error:
            if _is_mistake(error):
                raise ConfigError(f"logger.{key}: {' '.join(str(error).split())}") from error
            _report(key, error)
            logger = DummyLogger()
        _guard(key, logger)
        if isinstance(logger, WandbLogger | MLFlowLogger):
            ids[key] = logger.version
        if not isinstance(logger, TensorBoardLogger) and key not in known:  # MLflow lets nobody change parameters
            logger.log_hyperparams(config)
        loggers.append(logger)
    if ids != known:
        with contextlib.suppress(OSError):  # a full disk: a resumed stage would start another run there
            write_text(out / IDS, json.dumps(ids))
    return loggers


def _filled(stage: str, node: dict, out: Path, group: str, known: str | None) -> dict:
    """Return a logger's arguments, those that are not given filled with what the stage knows."""
    given = {key: value for key, value in node.items() if value is not None}
    if _kind(node) == "WandbLogger":
        own = {"save_dir": str(out), "group": group, "job_type": stage, "name": _name(out)}
        return own | given | ({"id": known} if known else {})
    if _kind(node) == "MLFlowLogger":
        folder = Path(given.pop("save_dir", "mlruns")).absolute()
        uri = given.get("tracking_uri") or os.environ.get("MLFLOW_TRACKING_URI") or f"file:{folder}"
        if "://" not in uri or uri.startswith("file:"):  # MLflow 3 keeps its file store, but wants it asked for
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        tags = {"group": group, "stage": stage} | given.pop("tags", {})
        own = {"run_name": _name(out)} | ({"run_id": known} if known else {})
        return own | given | {"tracking_uri": uri, "tags": tags}
    return {"save_dir": str(out)} | given


def _is_mistake(error: BaseException | None) -> bool:
    """Return whether the arguments or a missing login are to blame, not the disk or a server."""
    if error is None:
        return False
    return isinstance(error, TypeError) or type(error).__name__ == "UsageError" or _is_mistake(error.__cause__)


class _Attempts:
    """Calls to one logger: the first that fails is reported, and no more are made after it."""

    def __init__(self, key: str):
        self.key, self.failed = key, False

    def __call__(self, function: Callable, *args, **kwargs) -> Any:
        if not self.failed:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                self.failed = True
                _report(self.key, error)
        return None


def _guard(key: str, logger: Logger) -> None:
    """Let none of a logger's own errors end the run; it stays of its class, for callbacks that look at it."""
    logger.attempt = _Attempts(key)
    for name in GUARDED:
        setattr(logger, name, functools.partial(logger.attempt, getattr(logger, name)))


def _attempt(logger: Logger, function: Callable, *args) -> None:
    """Call a function with a logger; only those of `open_loggers` are guarded, not one of the user's own Trainer."""
    getattr(logger, "attempt", lambda call, *given: call(*given))(function, *args)


def _report(key: str, error: Exception) -> None:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    print(
        f"WARNING: logger={key} has failed and gets nothing more of this stage ({reason}); the run goes on, "
        "metrics.csv and result.json hold everything",
        file=sys.stderr,
    )


# --- what they get ----------------------------------------------------------------------------------------------------


def step_of_epoch(trainer: pl.Trainer) -> int:
    """Return the step at which Lightning logs the metrics of the epoch that ends: its last."""
    return max(0, trainer.global_step - 1)


def log_histogram(logger: Logger, name: str, values: torch.Tensor, step: int) -> None:
    """Log the distribution of some values (n,); MLflow, which knows none, gets a file `<name>/step-<step>.json`."""
    _attempt(logger, _histogram, logger, name, values, step)


def _histogram(logger: Logger, name: str, values: torch.Tensor, step: int) -> None:
    if isinstance(logger, WandbLogger):
        import wandb

        counted = wandb.Histogram(np_histogram=np.histogram(values.numpy(), BINS))
        logger.experiment.log({name: counted, "trainer/global_step": step})
    elif isinstance(logger, MLFlowLogger):
        counts, edges = np.histogram(values.numpy(), BINS)
        content = {"step": step, "edges": edges.tolist(), "counts": counts.tolist()}
        logger.experiment.log_dict(logger.run_id, content, f"{name}/step-{step:08}.json")
    elif add := getattr(getattr(logger, "experiment", None), "add_histogram", None):
        add(name, values, step)


def track(loggers: Iterable[Logger], out: Path) -> None:
    """Attach result.json, the figures and the final metrics that a stage has left in `out` to its loggers.

    Nothing is attached where there is no result.json. The metrics are called `final/...`: the same in every stage, beside
    the curves of those that have epochs.
    """
    if not (out / RESULT).exists():
        return
    result = json.loads((out / RESULT).read_text())
    files = [out / name for name in (*FIGURES, RESULT) if (out / name).exists()]
    for logger in loggers:
        logger.log_metrics(final_metrics(result))
        for file in files:
            _attempt(logger, _attach, logger, file)


def final_metrics(result: dict[str, Any]) -> dict[str, float]:
    """Return what a result.json says of the network that a stage leaves: accuracies, cost, the share of channels removed."""
    metrics = {key: value for key, value in result.get("metrics", {}).items() if isinstance(value, int | float)}
    metrics |= {key: result["cost"][key] for key in ("num_params", "macs") if key in result.get("cost", {})}
    if "ratio" in result:
        metrics["ratio"] = result["ratio"]["got"]
    return {f"final/{key}": float(value) for key, value in metrics.items()}


def _attach(logger: Logger, file: Path) -> None:
    """Add a figure or result.json to a logger's run; loggers of other kinds have the folder."""
    if isinstance(logger, MLFlowLogger):
        logger.experiment.log_artifact(logger.run_id, str(file))
    elif isinstance(logger, WandbLogger) and file.suffix == ".png":
        import wandb

        logger.experiment.log({file.stem: wandb.Image(str(file))})
    elif isinstance(logger, WandbLogger):
        copy = shutil.copy(
            file, logger.experiment.dir
        )  # by itself, wandb would keep a link that breaks when runs are moved
        logger.experiment.save(copy, base_path=logger.experiment.dir, policy="now")
    elif isinstance(logger, TensorBoardLogger) and file.suffix == ".png":
        from PIL import Image

        pixels = np.asarray(Image.open(file).convert("RGB"))  # (H, W, 3)
        logger.experiment.add_image(file.stem, pixels, dataformats="HWC")
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text(file.stem, f"```\n{file.read_text()}\n```")


def close(loggers: Iterable[Logger], failed: bool = False) -> None:
    """End the runs of some loggers, as finished or as failed."""
    for logger in loggers:
        logger.finalize("failed" if failed else "success")
        if isinstance(
            logger, WandbLogger
        ):  # even after an error: the next stage of this process would go on in this run
            with contextlib.suppress(Exception):
                logger.experiment.finish(exit_code=int(failed))
