"""One finished stage, as its result.json tells it, and the chain of runs that it came from."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimming.records import SCORES, Score, what_matters

EARLIER_NAMES = {"restored": "put_back", "dead": "followed"}  # of the counts of a plan

# Keys of a configuration that say how gammas are penalised, and whether channels leave by that.
PENALTY = ("sparsity", "target_ratio", "penalty", "shrink")
DETECTIONS = "detections.png"  # in the folder of a run: what its networks find in test images


@dataclass(eq=False)
class Run:
    """One finished stage.

    Attributes:
        folder: where its result.json lies.
        result: its content.
        parent: the run that its checkpoint came from, if that is in the collection.
    """

    folder: Path
    result: dict[str, Any]
    parent: "Run | None" = None

    @property
    def role(self) -> str:
        return self.result["role"]

    @property
    def score(self) -> Score:
        """What its network is judged by."""
        found = self.result.get("task") or self.result["config"].get("task")
        return SCORES.get(str(found), SCORES["classification"])

    def metric(self, split: str, suffix: str = "") -> float | None:
        """Return its score, in [0, 1], on `test` or `val`; of a pruning also `_before` it and `_pruned`, before calibration."""
        return self.result["metrics"].get(f"{split}/{self.score.key}{suffix}")

    @property
    def epochs(self) -> int:
        return len(self.result.get("history") or [])

    @property
    def penalty(self) -> str:
        """The penalty of a training: `l1`, or `polarization t 1.2`."""
        found = self.result["config"].get("penalty")
        found = found if isinstance(found, dict) else {}
        t = found.get("t")
        return f"{found.get('name') or 'l1'}" + (f" t {t:g}" if isinstance(t, float | int) else "")

    @property
    def chain(self) -> list["Run"]:
        """This run and those that it came from, the first first."""
        return [*(self.parent.chain if self.parent else []), self]

    def nearest(self, role: str) -> "Run | None":
        """Return the last run of a role in the chain."""
        return next((run for run in reversed(self.chain) if run.role == role), None)

    @property
    def prunings(self) -> list["Run"]:
        return [run for run in self.chain if run.role == "pruned"]

    @property
    def passes(self) -> int:
        return len(self.prunings)

    @property
    def asked(self) -> float | None:
        """The ratio of channels that the last pruning in the chain was asked to remove, if it was asked for one."""
        return self.prunings[-1].result["ratio"].get("asked") if self.prunings else None

    @property
    def removed(self) -> float | None:
        """The ratio of channels that the last pruning in the chain removed."""
        return self.prunings[-1].result["ratio"]["got"] if self.prunings else None

    @property
    def dense(self) -> dict[str, Any] | None:
        """{num_params, macs} of the network before any pruning, as far back as is known."""
        first = self.chain[0].result
        return first.get("cost_before") or (first["cost"] if first["role"] in ("baseline", "sparse") else None)

    def share(self, key: str) -> float | None:
        """Return which share of the dense network's `num_params` or `macs` this one has."""
        return self.result["cost"][key] / self.dense[key] if self.dense and self.dense[key] else None

    @property
    def latency(self) -> dict[str, Any] | None:
        """{before, after, batch, device, precision} of the last pruning in the chain, if it was timed; in ms."""
        return self.prunings[-1].result.get("latency_ms") if self.prunings else None

    @property
    def latency_share(self) -> float | None:
        """Latency as a share of the dense network's: the product over the passes, each timed in turns with its own parent."""
        timed = [run.result.get("latency_ms") for run in self.prunings]
        return math.prod(t["after"] / t["before"] for t in timed) if timed and all(timed) else None

    @property
    def identity(self) -> str:
        """The configurations of the chain but for seeds and folders: equal for repetitions of one experiment."""
        first = self.chain[0]
        unknown = first.result.get("parent") if first.parent is None else None
        return json.dumps([unknown, *(_repeated(run.result["config"]) for run in self.chain)], sort_keys=True)

    @property
    def recipe(self) -> dict[str, Any]:
        """The configuration of the chain's first run but for its penalty: equal for a baseline and its sparse runs."""
        config = _repeated(self.chain[0].result["config"])
        return {key: value for key, value in config.items() if key.partition(".")[0] not in PENALTY}

    @property
    def seeds(self) -> tuple:
        return tuple(run.result.get("seed") for run in self.chain)


def plan_count(result: dict[str, Any], name: str) -> int | None:
    """Return a count of a pruning's plan: `restored` (by constraints) or `dead` (removed because nothing needed it)."""
    plan = result.get("plan") or {}
    return plan.get(name, plan.get(EARLIER_NAMES[name]))


def _repeated(config: dict[str, Any]) -> dict[str, Any]:
    """Return what repetitions have in common: all that matters but the seeds; of the data's folder its name."""
    kept = {key: value for key, value in what_matters(config).items() if key not in ("seed", "data.seed")}
    data = config.get("data")
    root = data.get("root") if isinstance(data, dict) else None
    return kept | ({"data.root": Path(str(root)).name} if root else {})
