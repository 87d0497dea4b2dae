"""The one sentence of an experiment: what pruning has saved, and what it has cost."""

import statistics
from dataclasses import dataclass

from slimming.report.outcomes import Kind, Outcome
from slimming.report.words import goal, setting

TOLERANCE = 0.005  # of the accuracy: half a point
RULE = (
    "Shown: the fewest MACs among the prunings that lose at most half a point, or, if all lose more, the most accurate"
)


@dataclass(frozen=True)
class Reference:
    """The network that a pruned one is compared with: its name and accuracies, one per seed."""

    name: str
    test: list[float]
    validation: list[float]


def headline(outcomes: list[Outcome]) -> tuple[str, str] | None:
    """Return (the sentence, what it is of and how it was chosen), or None where nothing pruned was tested.

    Candidates are the fine-tuned prunings, else the calibrated and repaired ones, else those before calibration. A candidate
    is compared with the baseline of the same training configuration (sparsity apart); where there is none, with the sparse
    network that it came from. The one with the fewest MACs among those that lose at most `TOLERANCE` is chosen; if all lose
    more, the most accurate. Accuracies are means over seeds: on the validation split where all have one, else on the test set.
    """
    for kinds in ((Kind.FINETUNED,), (Kind.CALIBRATED, Kind.REPAIRED), (Kind.BEFORE_CALIBRATION,)):
        pairs = [(o, reference(o, outcomes)) for o in outcomes if o.kind in kinds and o.first.passes and o.accuracies]
        pairs = [(o, r) for o, r in pairs if r is not None and o.mean(lambda run: run.share("macs")) is not None]
        if pairs:
            return _sentence(*choose(pairs))
    return None


def reference(outcome: Outcome, outcomes: list[Outcome]) -> Reference | None:
    """Return what an outcome is compared with, if that was tested."""
    run, first = outcome.first, outcome.first.chain[0]
    baseline = next((o for o in outcomes if o.kind is Kind.BASELINE and o.first.recipe == run.recipe), None)
    if baseline is not None and baseline.accuracies:
        return Reference("baseline", baseline.accuracies, baseline.metric("val"))
    suffix = "_before" if first.role == "pruned" else ""  # its parent is not here, but its record tells of it
    sources = [*dict.fromkeys(run.chain[0] for run in outcome.runs)]
    known = ([source.metric(split, suffix) for source in sources] for split in ("test", "val"))
    test, validation = ([value for value in values if value is not None] for values in known)
    name = first.role if first.role in ("baseline", "sparse") else "before pruning"
    return Reference(name, test, validation) if test else None


def choose(pairs: list[tuple[Outcome, Reference]]) -> tuple[Outcome, Reference, bool]:
    """Return the pair to show by the rule of `headline`, and whether the validation split has decided."""
    held_out = all(outcome.metric("val") and ref.validation for outcome, ref in pairs)

    def accuracy(pair: tuple[Outcome, Reference]) -> float:
        return statistics.mean(pair[0].metric("val" if held_out else "test"))

    def loss(pair: tuple[Outcome, Reference]) -> float:
        return statistics.mean(pair[1].validation if held_out else pair[1].test) - accuracy(pair)

    def macs(pair: tuple[Outcome, Reference]) -> float:
        return pair[0].mean(lambda run: run.share("macs"))

    close = [pair for pair in pairs if loss(pair) <= TOLERANCE + 1e-9]  # 1e-9: rounding
    if close:
        return *min(close, key=lambda pair: (macs(pair), -accuracy(pair))), held_out
    return *max(pairs, key=lambda pair: (accuracy(pair), -macs(pair))), held_out


def _sentence(outcome: Outcome, ref: Reference, held_out: bool) -> tuple[str, str]:
    run = outcome.first
    params, macs = (outcome.mean(lambda r, k=key: r.share(k)) for key in ("num_params", "macs"))
    share = outcome.mean(lambda r: r.latency_share)
    speed = f", {faster(share)}" if share else ""
    before, after = statistics.mean(ref.test), statistics.mean(outcome.accuracies)
    score = f"{run.score.called} {before:.1%} ({ref.name}) -> {after:.1%}"
    sentence = f"{fewer(params)} parameters, {fewer(macs)} MACs{speed}, {score}"
    seeds = len(ref.test), len(outcome.accuracies)
    counted = f" (n={seeds[0]} -> n={seeds[1]}, means)" if max(seeds) > 1 else ""
    timed = f" Speed: {run.latency['batch']} images per pass, {run.latency['device']}." if share else ""
    split = "validation" if held_out else "test"
    what = f"Pruned, {goal(run)}: {outcome.kind.label}{counted} [{setting(run)}]; compared with: {ref.name}.{timed}"
    return sentence, f"{what} {RULE} ({split} {run.score.called})."


def fewer(share: float) -> str:
    """Write what remains as what went: 0.08 -> `92% fewer`, 1.02 as `2% more`; never a rounded `100% fewer`."""
    if share > 1:  # the MACs of a two-stage detector depend on its proposals
        return f"{share - 1:.0%} more"
    return f"{1 - share:.{0 if share >= 0.01 else 2}%} fewer"


def faster(share: float) -> str:
    """Write the latency that remains as a speed: 0.48 -> `2.1 times as fast`, 1.17 -> `1.2 times as slow`."""
    if 0.95 < share < 1.05:
        return "about as fast"
    return f"{1 / share:.1f} times as fast" if share < 1 else f"{share:.1f} times as slow"
