"""Timing forward passes in turns, and what of the machine such times depend on.

All runs get the same share of a machine that is busy now and idle then: every turn times each of them once, and two runs are
compared turn by turn.
"""

import math
import platform
import statistics
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from slimming.deploy.engines import ENGINES, cores, engine_version

FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
FLAGS += ("neon", "asimd", "asimddp", "i8mm", "sve")  # of Arm
MOST_PASSES = 200  # of a turn
FEWEST_TURNS = 3

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """How long one pass takes.

    Attributes:
        turns_ms: the median pass of every turn, in milliseconds.
        passes: how many were timed in a turn.
    """

    turns_ms: tuple[float, ...]
    passes: int

    @property
    def median_ms(self) -> float:
        return statistics.median(self.turns_ms)

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        """The first and the third quartile over the turns."""
        low, _, high = statistics.quantiles(self.turns_ms, n=4, method="inclusive")
        return low, high


def time_in_turns(
    runs: dict[Key, Callable[[], object]], turns: int = 15, turn_s: float = 0.03, budget_s: float = math.inf
) -> dict[Key, Timing]:
    """Time functions in turns.

    Within a turn a function runs once unwatched (caches, threads that have to wake up), then as often as fits into `turn_s`.
    One that takes longer than that runs once, watched: it leaves nothing of its own in a cache.

    Args:
        runs: functions that run one network each; each is called twice before the first turn.
        turns: fewer, but at least 3, where they would take longer than `budget_s`, in seconds.
    """
    once: dict[Key, float] = {}
    for key, run in runs.items():
        run()
        once[key] = _seconds(run)
    passes = {key: min(MOST_PASSES, max(1, round(turn_s / max(s, 1e-7)))) for key, s in once.items()}
    whole = sum((passes[key] + (passes[key] > 1)) * s for key, s in once.items())
    turns = max(FEWEST_TURNS, int(min(turns, budget_s / whole if whole else turns)))
    times: dict[Key, list[float]] = {key: [] for key in runs}
    for _ in range(turns):
        for key, run in runs.items():
            if passes[key] > 1:
                run()
            times[key].append(1000 * statistics.median(_seconds(run) for _ in range(passes[key])))
    return {key: Timing(tuple(times[key]), passes[key]) for key in runs}


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def core_share(seconds: float = 0.2) -> float:
    """Return what share of a core a thread of this process gets while it does nothing but work; near 1 on a quiet machine."""
    start, worked = time.perf_counter(), time.thread_time()
    while time.perf_counter() - start < seconds:
        pass
    return min(1.0, (time.thread_time() - worked) / (time.perf_counter() - start))


def cpu_flags() -> list[str]:
    """List the vector instructions of this CPU that decide how fast networks run; [] where the system does not tell."""
    there = set(_cpuinfo("flags").split()) | set(_cpuinfo("Features").split())
    return [flag for flag in FLAGS if flag in there]


def has_vnni(flags: list[str]) -> bool:
    """Return whether products of 8-bit numbers are summed in 32 bits by one instruction, without saturating at 16."""
    return any("vnni" in flag for flag in flags) or "amx_int8" in flags or "asimddp" in flags


def machine() -> dict[str, Any]:
    """Return what latencies depend on: CPU model, its flags that matter, the cores that may be used, engine versions."""
    versions = {name: engine_version(name) for name in ENGINES}
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "flags": cpu_flags(),
        "cores": cores(),
        "engines": {name: version for name, version in versions.items() if version},
    }


def _cpuinfo(key: str) -> str:
    """Return a value of the first processor in /proc/cpuinfo, "" where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")
