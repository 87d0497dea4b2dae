"""budget.latency: the table of a network's layers, kept beside its checkpoint, and the time of whole networks in the engine."""

import importlib.util
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from slimming import checkpoint
from slimming.channels import knapsack, surgery
from slimming.channels.copying import copy_model
from slimming.channels.graph import ChannelGraph
from slimming.channels.knapsack import LayerTimes
from slimming.channels.latency import STEP, Latency
from slimming.channels.plan import PruningPlan, fingerprint
from slimming.config import PruneConfig, SlimConfig
from slimming.config.schema import PruneOptions
from slimming.deploy import onnx_format
from slimming.deploy.capturing import Network
from slimming.deploy.engines import EXTRAS, cores, engine_version, torch_threads_kept
from slimming.deploy.layer_timing import layers_of, time_layers
from slimming.deploy.sharing import PROCESSES, Setting, Share, glanced_share, measured_share
from slimming.deploy.timing import machine
from slimming.errors import ConfigError, LatencyError, check_number
from slimming.files import write_text
from slimming.report.latencies import difference
from slimming.stages.sources import Source

ENGINES = {"torch": "torch", "onnx": "onnxruntime", "openvino": "openvino"}  # runtime -> engine
PACKAGES = {"torch": (), "onnx": onnx_format.PACKAGES, "openvino": (*onnx_format.PACKAGES, "openvino")}
ADDITIVE = ("lamp", "reconstruction")  # scores that say what a channel costs when its turn comes
TABLE_FORMAT = 1
WORTHWHILE = 0.1  # of what is asked for: a network that is farther off at a glance is not measured any better


def check(cfg: PruneConfig | SlimConfig) -> None:
    """Raise ConfigError unless the engine is installed, can run the network, and there are as many cores as threads."""
    missing = [package for package in PACKAGES[cfg.runtime] if importlib.util.find_spec(package) is None]
    if missing:
        extra = EXTRAS[ENGINES[cfg.runtime]]
        raise ConfigError(
            f"runtime={cfg.runtime} needs {' and '.join(missing)}, not installed here: pip install 'slimming[{extra}]'"
        )
    check_number("latency_threads", _threads(cfg), 1, cores(), whole=True)
    if cfg.runtime == "torch" and not str(cfg.model.get("_target_", "slimming.models.")).startswith("slimming.models."):
        raise ConfigError(
            "runtime=torch times checkpoints in fresh processes, which build models of this package alone: take runtime=onnx "
            f"or openvino for {cfg.model['_target_']}"
        )


def _threads(cfg: PruneOptions) -> int:
    return cfg.latency_threads or 1


class LatencyBudget:
    """The criterion of one pruning, and what it measured.

    Attributes:
        criterion: to plan by.
    """

    def __init__(self, cfg: PruneConfig, source: Source, graph: ChannelGraph, folder: Path) -> None:
        self.cfg, self.source, self.folder = cfg, source, folder
        image = tuple(source.example.shape[1:])
        self.setting = Setting(ENGINES[cfg.runtime], (cfg.latency_batch, *image), _threads(cfg))
        self.dense = self._written(source.model, "dense", [])
        self.table, times = _table(cfg, graph, self.setting)
        self.counted: list[tuple[dict[str, list[int]], Share]] = []  # kept channels and their share
        asked = {"runtime": cfg.runtime, "batch": cfg.latency_batch, "threads": _threads(cfg)}
        step = cfg.round_to if cfg.round_to > 1 else STEP
        additive = cfg.score in ADDITIVE
        self.criterion = Latency(cfg.budget.latency, times, self._measure, asked, step, additive)

    def _written(self, model: nn.Module, name: str, plans: list[PruningPlan]) -> Path:
        """Write a network, and the plans that led to it from the checkpoint's, as its engine reads it."""
        known = self.source.record
        record = replace(known, plans=[*known.plans, *(plan.to_dict() for plan in plans)])
        if self.setting.engine == "torch":
            path = self.folder / f"{name}.ckpt"
            checkpoint.write_network(copy_model(model).cpu().float(), record, path)
        else:
            path = self.folder / f"{name}.onnx"
            onnx_format.write(Network(self.source.task.exported(model), self.setting.images[1:], record), path)
        return path

    def _measure(self, plan: PruningPlan) -> float:
        """Return the share of the dense network's time that a plan's network takes; measured well where it is near."""
        thin = self._written(surgery.prune(self.source.model, plan, verify=False), "thin", [plan])
        share, asked = glanced_share(self.dense, thin, self.setting), self.cfg.budget.latency
        told = "at a glance"
        if abs(share / asked - 1) <= WORTHWHILE:
            found = measured_share(self.dense, thin, self.setting)
            self.counted.append((plan.keep, found))
            share, told = found.median, f"{PROCESSES} processes"
        number = len(self.criterion.tries) + 1
        print(f"latency: network {number} takes {share:.1%} of the dense time ({told}); {asked:.1%} are asked for")
        return share

    def facts(self, plan: PruningPlan) -> dict[str, Any]:
        """Return what result.json says of the plan that was made."""
        found = next(share for keep, share in reversed(self.counted) if keep == plan.keep)
        dense_ms, thin_ms = found.milliseconds
        return {
            "asked": self.cfg.budget.latency,
            "delivered": found.median,
            "spread": found.spread,
            "dense_ms": dense_ms,
            "ms": thin_ms,
            "runtime": self.cfg.runtime,
            "engine": self.setting.engine,
            "version": engine_version(self.setting.engine),
            "batch": self.cfg.latency_batch,
            "threads": self.setting.threads,
            "processes": len(found.pairs),
            "passes": found.turns,
            "tries": [{"table": tried.table, "measured": tried.measured} for tried in self.criterion.tries],
            "table": self.table["file"],
            "table_s": self.table["seconds"],
            "machine": machine(),
        }


@contextmanager
def latency_budget(cfg: PruneConfig, source: Source, graph: ChannelGraph) -> Iterator[LatencyBudget | None]:
    """Give the budget of a pruning until the block ends, None where no latency is asked for."""
    if cfg.budget.latency is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="latency-") as folder:
        yield LatencyBudget(cfg, source, graph, Path(folder))


def text(facts: dict[str, Any]) -> str:
    """Say what was asked and what was delivered."""
    return (
        f"latency: {facts['asked']:.1%} of the dense network's asked, {facts['delivered']:.1%} delivered "
        f"({facts['dense_ms']:.2f} -> {facts['ms']:.2f} ms; interquartile range {facts['spread']:.1%} over "
        f"{facts['processes']} processes of {facts['passes']} turns) in {facts['engine']} {facts['version']}, "
        f"batch {facts['batch']}, {facts['threads']} thread{'s' * (facts['threads'] > 1)}"
    )


# --- the table --------------------------------------------------------------------------------------------------------


def table_path(cfg: PruneConfig) -> Path:
    """Return where the table of a checkpoint lies for a runtime, a batch and a number of threads."""
    source = Path(str(cfg.checkpoint))
    return source.with_name(f"{source.name}.latency-{cfg.runtime}-{cfg.latency_batch}x{_threads(cfg)}.json")


def _table(cfg: PruneConfig, graph: ChannelGraph, setting: Setting) -> tuple[dict[str, Any], dict[str, LayerTimes]]:
    """Return the table that lies beside the checkpoint, and its layers; measure it where there is none."""
    path = table_path(cfg)
    if path.exists():
        found, times = _read(path, graph, setting)
        print(f"latency: the table of the layers is {path}, measured before in {found['seconds']:.0f} s")
        return found | {"file": path.name}, times
    layers = layers_of(graph, setting.images[1:], setting.engine)
    count, where = (
        len(set(layers.values())),
        f"{setting.engine}, batch {setting.images[0]}, {setting.threads} thread(s)",
    )
    print(f"latency: {count} layers are timed over their widths in {where}")
    began = time.perf_counter()
    with torch_threads_kept():
        times = time_layers(layers, setting.engine, setting.images[0], setting.threads)
    found = {
        "format": TABLE_FORMAT,
        "network": fingerprint(graph.model),
        "engine": setting.engine,
        "images": list(setting.images),
        "threads": setting.threads,
        "machine": machine(),
        "seconds": time.perf_counter() - began,
        "times": knapsack.record(times),
    }
    try:
        write_text(path, json.dumps(found))
    except OSError as error:
        raise LatencyError(
            f"the table of the layers' latencies is kept beside the checkpoint, and {path} cannot be written "
            f"({error.strerror}): copy the checkpoint into a folder of your own"
        ) from error
    print(f"latency: the table of the layers took {found['seconds']:.0f} s -> {path}")
    return found | {"file": path.name}, times


def _read(path: Path, graph: ChannelGraph, setting: Setting) -> tuple[dict[str, Any], dict[str, LayerTimes]]:
    """Read a table; LatencyError where it is damaged, or not of this network, engine and machine."""
    anew = "delete it, and the table is measured anew"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != TABLE_FORMAT:
            raise ValueError(f"format {found['format']!r}, this version reads {TABLE_FORMAT}")
        times = knapsack.read(found["times"])
        unlike = difference(machine(), found["machine"], setting.engine)
        same = [found["network"], found["engine"], found["images"], found["threads"]]
        seconds = float(found["seconds"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise LatencyError(f"{path} is no table of latencies ({type(error).__name__}: {error}): {anew}") from error
    if unlike:
        raise LatencyError(f"{path} was measured on another machine or engine, here and there: {unlike}; {anew} here")
    if same != [fingerprint(graph.model), setting.engine, list(setting.images), setting.threads]:
        raise LatencyError(f"{path} is of another network, engine or setting: {anew}")
    return found | {"seconds": seconds}, times
