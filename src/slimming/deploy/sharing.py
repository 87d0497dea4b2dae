"""The share of one network's time that another takes in an engine: both timed in turns, in processes that do nothing else.

Every process has its own memory layout and its own threads, and a machine its busy minutes: the median of one process is off by
several per cent. So a share is the median of several processes, and their spread says whether it can be trusted.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slimming.deploy.engines import open_engine
from slimming.deploy.timing import time_in_turns
from slimming.errors import LatencyError

SOURCE = Path(__file__).parents[2]  # what holds the package `slimming`
PROCESSES, TURNS = 5, 50  # of a measurement that counts
GLANCE = (2, 15)  # processes and turns of one that says whether it is worth while
LARGEST_SPREAD, ATTEMPTS = 0.05, 3


@dataclass(frozen=True)
class Setting:
    """How a pass is run: engine (of engines.ENGINES), images (N, C, H, W) of a pass, threads."""

    engine: str
    images: tuple[int, ...]
    threads: int


@dataclass(frozen=True)
class Pair:
    """Two networks in turns in one process: the median over the turns of the second's time as a share of the first's."""

    share: float
    dense_ms: float
    thin_ms: float


@dataclass(frozen=True)
class Share:
    """What several processes found.

    Attributes:
        pairs: one for each.
        turns: of each.
    """

    pairs: tuple[Pair, ...]
    turns: int

    @property
    def median(self) -> float:
        return statistics.median(pair.share for pair in self.pairs)

    @property
    def spread(self) -> float:
        """The interquartile range of the shares, as a share of their median."""
        low, _, high = statistics.quantiles((pair.share for pair in self.pairs), n=4, method="inclusive")
        return (high - low) / self.median

    @property
    def milliseconds(self) -> tuple[float, float]:
        """The median times of the first and the second network."""
        return statistics.median(p.dense_ms for p in self.pairs), statistics.median(p.thin_ms for p in self.pairs)


Timer = Callable[[Path, Path, Setting, int], Pair]


def time_pair(dense: Path, thin: Path, setting: Setting, turns: int) -> Pair:
    """Time two networks in turns in a fresh process.

    Args:
        dense, thin: files that the engine reads.

    Raises:
        LatencyError: the process fails; the message ends with what it says.
    """
    asked = json.dumps([str(dense), str(thin), setting.engine, setting.images, setting.threads, turns])
    search = os.pathsep.join(dict.fromkeys([str(SOURCE), *filter(None, sys.path)]))  # records name classes anywhere
    done = subprocess.run(
        [sys.executable, "-m", "slimming.deploy.sharing"],
        input=asked,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": search},
        check=False,
    )
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2][:300]
        raise LatencyError(f"a fresh process cannot time the network in {setting.engine}: {last}")
    return Pair(*json.loads(done.stdout.strip().rpartition("\n")[2]))


def measured_share(dense: Path, thin: Path, setting: Setting, timer: Timer = time_pair) -> Share:
    """Measure a share that counts: again where the processes disagree, and not at all where they go on to.

    Raises:
        LatencyError: the interquartile range is above 5% of the median three times.
    """
    spreads = []
    for _ in range(ATTEMPTS):
        share = _share(dense, thin, setting, timer, PROCESSES, TURNS)
        if share.spread <= LARGEST_SPREAD:
            return share
        spreads.append(share.spread)
    raise LatencyError(
        f"the machine is too noisy to measure a latency: the interquartile range over {PROCESSES} processes is "
        f"{', '.join(f'{spread:.1%}' for spread in spreads)} of the median, and more than {LARGEST_SPREAD:.0%} cannot be "
        "trusted: run again when nothing else runs here, or with a larger latency_batch; the table of the layers is kept"
    )


def glanced_share(dense: Path, thin: Path, setting: Setting, timer: Timer = time_pair) -> float:
    """Return about what share it is, from fewer processes and turns."""
    return _share(dense, thin, setting, timer, *GLANCE).median


def _share(dense: Path, thin: Path, setting: Setting, timer: Timer, processes: int, turns: int) -> Share:
    return Share(tuple(timer(dense, thin, setting, turns) for _ in range(processes)), turns)


def serve() -> None:
    """Be that process: what to time comes in on stdin, the pair goes out on the last line of stdout."""
    dense, thin, engine, shape, threads, turns = json.loads(sys.stdin.read())
    images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    runs = {name: _opened(Path(path), engine, threads, images) for name, path in (("dense", dense), ("thin", thin))}
    times = time_in_turns(runs, turns)
    ratios = [b / a for a, b in zip(times["dense"].turns_ms, times["thin"].turns_ms, strict=True)]
    print(json.dumps([statistics.median(ratios), times["dense"].median_ms, times["thin"].median_ms]))


def _opened(path: Path, engine: str, threads: int, images: np.ndarray) -> Callable[[], Any]:
    run = open_engine(path, engine, threads)
    return lambda: run(images)


if __name__ == "__main__":
    serve()
