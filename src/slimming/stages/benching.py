"""Latency and throughput of networks side by side: files of any kind, each in the engines that read it, timed in turns."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from slimming.config import BenchConfig
from slimming.deploy.engines import READS, Engine, InputShape, cores, open_engine, torch_threads_kept
from slimming.deploy.timing import core_share, machine, time_in_turns
from slimming.errors import ConfigError
from slimming.files import write_text
from slimming.report import latencies
from slimming.stages.recording import quiet

PICTURE = "bench.png"


def bench(cfg: BenchConfig, out: Path) -> float:
    """Time `cfg.models`; print a table, leave bench.json and bench.png in `out`.

    Returns:
        nan: no accuracy is measured.

    Raises:
        ConfigError: a file that is missing or of another kind, an engine that is not installed, inputs that differ, more
            threads than cores.
    """
    pairs = _pairs(cfg)
    with quiet(), torch_threads_kept():
        shape = _common_shape(cfg, [(path, open_engine(path, name, cfg.threads[0])) for path, name in pairs])
        share = core_share()
        rows = [row for threads in cfg.threads for row in _rows(cfg, pairs, shape, threads)]
    found = {
        "format": latencies.BENCH_FORMAT,
        "machine": machine(),
        "core_share": share,
        "input": list(shape),
        "files": {path: _facts(Path(path)) for path in cfg.models},
        "rows": rows,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / latencies.BENCH, json.dumps(found, indent=1))
    latencies.figure(found, out / PICTURE)
    print(f"{latencies.note(found)}\n\n{latencies.table(found).text()}\n\n-> {out / latencies.BENCH}, {PICTURE}")
    return math.nan


def _pairs(cfg: BenchConfig) -> list[tuple[str, str]]:
    """Return (file, engine) for every timing; ConfigError for a file that none of the engines reads."""
    pairs = []
    for path in cfg.models:
        able = READS.get(Path(path).suffix, ())
        if not able:
            raise ConfigError(f"models: {path} is of no kind that can be timed: {', '.join(READS)}")
        if not Path(path).is_file():
            raise ConfigError(f"models: there is no file {path}")
        chosen = able[:1] if cfg.engines is None else [name for name in able if name in cfg.engines]
        if not chosen:
            raise ConfigError(
                f"models: {path} is read by {' and '.join(able)}, none of which is in engines={list(cfg.engines or ())}"
            )
        pairs += [(path, name) for name in chosen]
    too_many = [count for count in cfg.threads if count > cores()]
    if too_many:
        raise ConfigError(f"threads={too_many[0]} is more than the {cores()} core(s) that this process may use")
    return pairs


def _common_shape(cfg: BenchConfig, opened: list[tuple[str, Engine]]) -> tuple[int, ...]:
    """Return the (C, H, W) that all networks take; ConfigError where they differ or do not take the batches."""
    known: dict[str, InputShape] = {path: engine.shape for path, engine in opened if engine.shape}
    for path, shape in known.items():
        for batch in cfg.batch:
            if shape[0] not in (None, batch):
                raise ConfigError(f"models: {path} takes batches of {shape[0]} alone, not batch={batch}")
    shapes = {path: shape[1:] for path, shape in known.items() if None not in shape[1:]}
    if not shapes:
        raise ConfigError(f"models: none of {', '.join(cfg.models)} says what shape its input has")
    first, shape = next(iter(shapes.items()))
    for path, other in shapes.items():
        if other != shape:
            raise ConfigError(
                f"models: the inputs differ: {first} takes {_by(shape)}, {path} takes {_by(other)}; time them apart"
            )
    return shape


def _by(shape: InputShape) -> str:
    return "x".join(map(str, shape))


def _rows(cfg: BenchConfig, pairs: list[tuple[str, str]], shape: tuple[int, ...], threads: int) -> list[dict[str, Any]]:
    """Time all pairs with so many threads, every batch by itself."""
    engines = {(path, name): open_engine(path, name, threads) for path, name in pairs}
    rows = []
    for batch in cfg.batch:
        images = np.random.default_rng(0).standard_normal((batch, *shape), dtype=np.float32)
        runs = {key: (lambda engine=engine, images=images: engine(images)) for key, engine in engines.items()}
        for (path, name), timing in time_in_turns(runs, cfg.turns, budget_s=cfg.budget_s * len(pairs)).items():
            row = {"model": path, "engine": name, "threads": threads, "batch": batch, "median_ms": timing.median_ms}
            row |= {"quartiles_ms": list(timing.quartiles_ms), "images_per_s": 1000 * batch / timing.median_ms}
            rows.append(row | {"passes": timing.passes, "turns_ms": list(timing.turns_ms)})
    return rows


def _facts(path: Path) -> dict[str, Any]:
    """Return the size of a file, of OpenVINO's with the weights beside it, and the sha256 of what was named."""
    weights = path.with_suffix(".bin")
    size = path.stat().st_size + (weights.stat().st_size if path.suffix == ".xml" and weights.is_file() else 0)
    return {"bytes": size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
