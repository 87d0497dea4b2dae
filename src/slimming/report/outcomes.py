"""Outcomes: what the seeds of one experiment have in common. Tables have a row, pictures a point for each."""

import enum
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

from slimming.channels.options import REDUCED, PlanOptions
from slimming.report.runs import Run


class Kind(enum.IntEnum):
    """What an accuracy was measured on, in the order of the rows of one setting."""

    BASELINE = 0
    SPARSE = 1
    BEFORE_CALIBRATION = 2
    CALIBRATED = 3
    REPAIRED = 4
    FINETUNED = 5
    SCRATCH = 6
    RETRAINED = 7  # a pruned network that was trained again as a dense one is: the next pass of a multi-pass scheme

    @property
    def label(self) -> str:
        words = {Kind.FINETUNED: "fine-tuned", Kind.SCRATCH: "from scratch", Kind.RETRAINED: "trained again"}
        return words.get(self, self.name.lower().replace("_", " "))


@dataclass(frozen=True)
class Point:
    """A point of a picture: all values in per cent; `spread` is the standard deviation of y over seeds, 0 for one seed."""

    x: float
    y: float
    spread: float = 0.0


@dataclass(frozen=True, eq=False)
class Outcome:
    """One kind of network of one experiment; `runs` are its repetitions, one per seed."""

    kind: Kind
    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def accuracies(self) -> list[float]:
        """Test accuracies (of detectors mAP@0.5) in [0, 1] of the repetitions that were tested."""
        return self.metric("test")

    def metric(self, split: str) -> list[float]:
        """Return the known scores of this kind of network on `test` or `val`, one per repetition."""
        suffix = "_pruned" * (self.kind is Kind.BEFORE_CALIBRATION)
        return [value for run in self.runs if (value := run.metric(split, suffix)) is not None]

    def mean(self, value: Callable[[Run], float | None]) -> float | None:
        return mean(value(run) for run in self.runs)

    def point(self, x: Callable[[Run], float | None]) -> Point | None:
        """Return the accuracy over `x`, both averaged over the repetitions; None where either is unknown."""
        across, accuracies = self.mean(x), self.accuracies
        if across is None or not accuracies:
            return None
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        return Point(100 * across, 100 * statistics.mean(accuracies), 100 * spread)


def outcomes(runs: Iterable[Run]) -> list[Outcome]:
    """Group runs by experiment and kind, in the order of the tables; of a run that is there twice the last copy counts."""
    groups: dict[tuple[Kind, str], dict[tuple, Run]] = {}
    for run in runs:
        for kind in _kinds(run):
            groups.setdefault((kind, run.identity), {})[run.seeds] = run
    return sorted((Outcome(kind, tuple(by_seed.values())) for (kind, _), by_seed in groups.items()), key=_order)


def mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def options(run: Run) -> list[str]:
    """Name the options of the last pruning that differ from their defaults, but for the ratio: `max_layer_ratio 0.9`."""
    if not run.prunings:
        return []
    config, criterion = run.prunings[-1].result["config"], run.prunings[-1].result.get("criterion") or {}
    words = []
    kind = criterion.get("criterion", "GlobalRatio")
    if kind == "Latency":
        words.append(f"latency {criterion.get('latency')} in {criterion.get('runtime')}")
    elif kind != "GlobalRatio":
        values = {k: v for k, v in criterion.items() if k not in ("criterion", "ratio") and not isinstance(v, str)}
        words.append(" ".join([kind, *(f"{k} {v:g}" for k, v in values.items())]))
    reduce = REDUCED.get(str(config.get("ties")), REDUCED["together"])
    defaults = asdict(PlanOptions()) | {"convention": "exact", "reduce": reduce}
    words += [f"{k} {config[k]}" for k, default in defaults.items() if config.get(k, default) != default]
    words += ["repaired"] * bool(config.get("repair"))
    return words + [f"pass {run.passes}"] * (run.passes > 1)


def _kinds(run: Run) -> list[Kind]:
    if run.role == "pruned":
        config = run.result["config"]
        if config.get("repair"):
            return [Kind.BEFORE_CALIBRATION, Kind.REPAIRED]
        return [Kind.BEFORE_CALIBRATION, *[Kind.CALIBRATED] * bool((config.get("calibrate") or {}).get("batches"))]
    if run.role in ("finetuned", "scratch"):
        return [Kind.FINETUNED if run.role == "finetuned" else Kind.SCRATCH]
    if run.passes:
        return [Kind.RETRAINED]
    return [Kind.BASELINE if run.role == "baseline" else Kind.SPARSE]


def _order(outcome: Outcome) -> tuple:
    """Sort by pass, dense networks first; then by setting, simple ones first; then by ratio; then by kind."""
    run = outcome.first
    sparse, chosen = run.nearest("sparse"), options(run)
    training = (sparse.epochs, sparse.penalty, *_strength(sparse.result["config"])) if sparse else (0, "", 0.0, 0.0)
    dense = outcome.kind if not run.passes else Kind.BEFORE_CALIBRATION
    return (run.passes, dense, len(chosen), chosen, training, run.asked or 0, run.removed or 0, outcome.kind)


def _strength(config: dict) -> tuple[float, float]:
    """Sort fixed lambdas first, then targets of `sparsity=auto`."""
    sparsity, target = config.get("sparsity") or 0, config.get("target_ratio") or 0
    return (0.0, target) if sparsity == "auto" else (-1.0, sparsity)
