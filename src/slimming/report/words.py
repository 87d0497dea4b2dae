"""How runs and numbers are named in a report."""

import statistics
from collections.abc import Callable, Iterable

from slimming.report.outcomes import Kind, Outcome, mean, options
from slimming.report.runs import Run


def training(run: Run) -> str:
    """Name a training: `lambda 0.0005, 20 epochs`, and what it held out for validation: `val_size 5000`.

    Another penalty than the paper's stands first: `proximal, lambda 0.0005, 20 epochs`.
    """
    config = run.result["config"]
    data = config.get("data")
    held_out = data.get("val_size") if isinstance(data, dict) else None
    kind = "" if run.penalty == "l1" else f"{run.penalty}, "
    words = [f"{kind}{_lambda(config)}"] * (run.role == "sparse") + ["shrinking"] * bool(config.get("shrink"))
    words += [f"{run.epochs} epochs"] * bool(run.epochs) + [f"val_size {held_out}"] * bool(held_out)
    return ", ".join(words)


def _lambda(config: dict) -> str:
    """Name the strength of a penalty: `lambda 0.0005`, `lambda auto to 70%`."""
    sparsity = config.get("sparsity") or 0
    return f"lambda auto to {config['target_ratio']:.0%}" if sparsity == "auto" else f"lambda {sparsity:g}"


def setting(run: Run) -> str:
    """Name how a network was trained and pruned, but for the ratio: `lambda 0.0005, 20 epochs, max_layer_ratio 0.9`."""
    source = run.nearest("sparse") or (run if run.role == "baseline" else None)
    return ", ".join([*([training(source)] if source and training(source) else []), *options(run)]) or "-"


def network(outcome: Outcome) -> str:
    """Name a row of a table: `pruned, ratio 0.5: fine-tuned, 10 epochs`."""
    run, kind = outcome.first, outcome.kind
    if kind in (Kind.BASELINE, Kind.SPARSE):
        return run.role
    origin = f"pruned, {goal(run)}" if run.passes else ""
    if run.result.get("parent") and run.parent is None:
        origin = f"{origin} from a run that is not here".strip()
    words = [kind.label]
    if kind in (Kind.FINETUNED, Kind.SCRATCH, Kind.RETRAINED):
        words.append(f"{run.epochs} epochs")
    if ((run.result["config"].get("finetune") or {}).get("distill") or {}).get("teacher"):
        words.append("distilled")
    return f"{origin or 'not pruned'}: {', '.join(words)}"


def goal(run: Run) -> str:
    """Name what a pruning was asked for: `ratio 0.5`, or what it removed where no ratio was asked for."""
    return f"ratio {run.asked:g}" if run.asked is not None else f"{run.removed:.1%} removed"


def percent(values: Iterable[float | None]) -> str:
    """Write accuracies in [0, 1] as `81.40`, or as `81.40 ± 0.21 (n=3)`; "-" for none."""
    known = [100 * v for v in values if v is not None]
    if not known:
        return "-"
    middle = f"{statistics.mean(known):.2f}"
    return middle if len(known) == 1 else f"{middle} ± {statistics.stdev(known):.2f} (n={len(known)})"


def average(values: Iterable[float | None], form: Callable[[float], str]) -> str:
    """Write the mean of the known values; "-" for none."""
    middle = mean(values)
    return "-" if middle is None else form(middle)


def latency(runs: Iterable[Run]) -> str:
    """Write the mean latencies before and after pruning: `11.9 -> 10.2` (ms); "-" where nothing was timed.

    Where a latency was asked for, in which engine and what was delivered stands behind it.
    """
    runs = list(runs)
    timed = [run.latency for run in runs if run.latency]
    means = " -> ".join(f"{statistics.mean(t[k] for t in timed):.1f}" for k in ("before", "after")) if timed else ""
    return "; ".join(filter(None, (means, delivered(runs)))) or "-"


def delivered(runs: Iterable[Run]) -> str:
    """Write what a latency budget asked for and got: `onnxruntime: 50% asked, 49.7% delivered`; "" where there was none."""
    found = [run.prunings[-1].result.get("latency") for run in runs if run.prunings]
    told = [facts for facts in found if facts]
    if not told:
        return ""
    share = statistics.mean(facts["delivered"] for facts in told)
    return f"{told[0]['engine']}: {told[0]['asked']:.1%} asked, {share:.1%} delivered"


def cost(runs: Iterable[Run], key: str, form: Callable[[float], str]) -> str:
    """Write the mean of `num_params` or `macs`, with what pruning has saved: `274,885 (-78.1%)`."""
    runs = list(runs)
    value = form(statistics.mean(run.result["cost"][key] for run in runs))
    share = mean(run.share(key) for run in runs) if runs[0].passes else None
    return value if share is None else f"{value} ({share - 1:+.1%})"


def count(value: float) -> str:
    return f"{value:,.0f}"


def millions(value: float) -> str:
    return f"{value / 1e6:,.2f}"
