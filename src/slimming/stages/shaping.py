"""The shape of an export: which of several networks that compute the same becomes the artefact."""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from slimming.config import ExportConfig
from slimming.deploy.capturing import Network
from slimming.deploy.engines import cores, open_engine
from slimming.deploy.quantising import quantise
from slimming.deploy.shaping import (
    AS_PRUNED,
    Decision,
    Shape,
    Shaped,
    choose,
    replayed,
    shaped,
    shapes_of,
)
from slimming.deploy.timing import machine, time_in_turns
from slimming.errors import CheckpointError, PlanError, SlimmingError, check_number
from slimming.stages.building import dtype_of
from slimming.stages.sources import Source

ENGINES = {"onnx": "onnxruntime", "openvino": "openvino"}  # format -> what times it; the others have no engine here
BUDGET_S = 4.0  # seconds of timing per candidate; slow ones get fewer turns

Facts = dict[str, Any]


def write_shaped(
    cfg: ExportConfig, source: Source, network: Network, file_format: ModuleType, path: Path
) -> Facts | None:
    """Write the artefact of a network in the shape that was recorded, or is fastest, or as it is.

    Args:
        path: where it goes; its folder holds nothing else.

    Returns:
        What export.json says of the shape; None where the network was left as it is.
    """
    if cfg.shape_from:
        return _replay(cfg, network, file_format, path)
    wanted = cfg.shape or ("auto" if cfg.format in ENGINES and _was_changed(source) else "none")
    candidates = _candidates(network, cfg.shape == "auto") if wanted == "auto" else None
    if candidates is None or (len(candidates.made) == 1 and source.dense is None):
        file_format.write(network, path)
        return None
    return _fastest(cfg, source, network, candidates, file_format, path)


def _was_changed(source: Source) -> bool:
    return bool(source.record.plans or source.record.low_rank)


def _candidates(network: Network, asked: bool) -> Shaped | None:
    """Return the networks to choose from; None, and why, where this one cannot be followed but nobody asked for a shape."""
    try:
        return shaped(network.model, network.example.to(dtype_of(network.model)), shapes_of(network.model))
    except SlimmingError as error:
        if asked:
            raise
        print(f"shape: left as it is: {error}")
        return None


# --- timing -----------------------------------------------------------------------------------------------------------


def _fastest(
    cfg: ExportConfig, source: Source, network: Network, candidates: Shaped, file_format: ModuleType, path: Path
) -> Facts:
    """Write all candidates and the dense network, time them, and keep the file of the fastest candidate."""
    check_number("latency_threads", cfg.latency_threads, 1, cores(), whole=True)
    engine, began = ENGINES[cfg.format], time.perf_counter()
    count = len(candidates.made) + (source.dense is not None)
    precision = cfg.quantize.to or "float32"
    setting = f"{engine}, {precision}, batch {cfg.latency_batch}, {cfg.latency_threads} thread(s)"
    print(f"shape: {count} networks are written and timed in {setting}; shape=none or shape_from= go without")
    with tempfile.TemporaryDirectory(prefix="shapes-", dir=path.parent) as folder:
        write = _writer(cfg, network, file_format, Path(folder), path.name)
        files = {shape: write(model) for shape, model in candidates.made.items()}
        dense = source.dense and write(source.dense())
        decision = _time(cfg, engine, network, files, dense)
        for suffix in file_format.SUFFIXES:
            files[decision.shape].with_suffix(suffix).replace(path.with_suffix(suffix))
    seconds = time.perf_counter() - began
    print(decision.table())
    print(f"shape: {decision.shape.label} ({seconds:.0f} s)")
    return {
        "shape": decision.shape.record(),
        "beats_dense": decision.beats_dense,
        "timed": decision.record_times(),
        "refused": [{"shape": shape.record(), "why": why} for shape, why in candidates.refused.items()],
        "precision": precision,
        "engine": engine,
        "batch": cfg.latency_batch,
        "threads": cfg.latency_threads,
        "machine": machine(),
        "seconds": seconds,
    }


def _writer(
    cfg: ExportConfig, network: Network, file_format: ModuleType, folder: Path, name: str
) -> Callable[[Any], Path]:
    """Return what writes a network into a folder of its own below `folder`."""

    def write(model: Any) -> Path:
        path = Path(tempfile.mkdtemp(dir=folder)) / name
        file_format.write(replace(network, model=model), path)
        return path

    return write


def _time(cfg: ExportConfig, engine: str, network: Network, files: dict[Shape, Path], dense: Path | None) -> Decision:
    images = np.random.default_rng(0).standard_normal((cfg.latency_batch, *network.image), dtype=np.float32)

    def opened(path: Path) -> Callable[[], Any]:
        run = open_engine(_quantised(cfg, path, images[:2]), engine, cfg.latency_threads)
        return lambda: run(images)

    def measure(runs: dict[Any, Any]) -> dict[Any, float]:
        timings = time_in_turns(runs, budget_s=BUDGET_S * len(runs))
        return {key: timing.median_ms for key, timing in timings.items()}

    return choose({shape: opened(path) for shape, path in files.items()}, measure, dense and opened(dense))


def _quantised(cfg: ExportConfig, path: Path, images: np.ndarray) -> Path:
    """Return the artefact to time: in int8 where that is what is exported, with ranges of random images."""
    if not cfg.quantize.to:
        return path
    target = path.with_name(f"int8-{path.name}")
    given = cfg.quantize
    quantise(path, target, [images], max_drop=None, reduce_range=given.reduce_range, symmetric=given.symmetric)
    return target


# --- replaying --------------------------------------------------------------------------------------------------------


def _replay(cfg: ExportConfig, network: Network, file_format: ModuleType, path: Path) -> Facts | None:
    shape = _recorded(cfg.shape_from)
    made, refused = shaped(network.model, network.example.to(dtype_of(network.model)), [shape])
    if refused:
        raise PlanError(f"shape_from={cfg.shape_from}: {shape.label} is not possible here: {refused[shape]}")
    file_format.write(replace(network, model=made[shape]), path)
    print(f"shape: {shape.label}, as {cfg.shape_from} records")
    return {"shape": shape.record(), "from": str(cfg.shape_from)}


def _recorded(path: Any) -> Shape:
    """Return the shape that an export.json records; as it was pruned where that export was left so."""
    try:
        facts = json.loads(Path(path).read_text(encoding="utf-8"))
        shaping = facts["shaping"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"shape_from={path} is no export.json ({type(error).__name__}: {error})") from error
    if shaping is None:
        return AS_PRUNED
    return replayed(shaping.get("shape") if isinstance(shaping, dict) else None, path)
