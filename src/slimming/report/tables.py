"""The tables of an experiment, made from its outcomes; and the spreadsheet of all runs."""

import json
from pathlib import Path

from slimming.report import words
from slimming.report.collect import Collection
from slimming.report.document import Table
from slimming.report.outcomes import Kind, Outcome
from slimming.report.published import published_for
from slimming.report.runs import Run, plan_count

TESTED = "test "  # how the head of the column of scores begins

CSV = ("run", "role", "model", "data", "seed", "parent", "sparsity", "penalty")
CSV += ("ratio_asked", "ratio_got", "restored", "dead")
CSV += ("test_acc_before", "test_acc_pruned", "test_acc", "val_acc")
CSV += ("test_map50_before", "test_map50_pruned", "test_map50", "test_map", "val_map50")
CSV += ("n_test", "num_params", "macs")
CSV += (
    "activation_bytes",
    "size_bytes",
    "latency_before_ms",
    "latency_after_ms",
    "latency_device",
    "epochs",
    "wall_time_s",
)


def _tested(outcomes: list[Outcome]) -> str:
    """Return the head of the column of scores; all outcomes of a section are of one task."""
    return f"{TESTED}{outcomes[0].first.score.called if outcomes else 'accuracy'} (%)"


def stages(outcomes: list[Outcome]) -> Table:
    """Accuracy and costs of every kind of network; of the prunings those that were trained further, if any were."""
    further = {x for o in outcomes if o.kind in (Kind.FINETUNED, Kind.SCRATCH) for run in o.runs for x in run.chain}
    pruned = [o for o in outcomes if o.kind in (Kind.BEFORE_CALIBRATION, Kind.CALIBRATED, Kind.REPAIRED)]
    shown = [o for o in pruned if not further.isdisjoint(o.runs)] or pruned
    head = ["network", "setting", "channels removed", _tested(outcomes), "parameters", "MACs (M)", "FLOPs (M)"]
    head += ["activations (kB/image)", "weights (MB)", "latency (ms)"]
    rows = []
    for outcome in (o for o in outcomes if o not in pruned or o in shown):
        runs, results = outcome.runs, [run.result for run in outcome.runs]
        rows.append(
            [
                words.network(outcome),
                words.setting(outcome.first),
                words.average((run.removed for run in runs), lambda v: f"{v:.1%}"),
                words.percent(outcome.accuracies),
                words.cost(runs, "num_params", words.count),
                words.cost(runs, "macs", words.millions),
                words.average((2 * r["cost"]["macs"] for r in results), words.millions),
                words.average((r.get("activation_bytes") for r in results), lambda v: f"{v / 1e3:,.0f}"),
                words.average((r.get("size_bytes") for r in results), lambda v: f"{v / 1e6:.2f}"),
                words.latency(runs),
            ]
        )
    return Table(head, rows, left=2)


def stages_note(runs: list[Run]) -> str:
    note = f"Test {runs[0].score.called} of the last epoch; several seeds: mean ± standard deviation. "
    note += "FLOPs = 2 x MACs, of one image."
    timed = next((run.result["latency_ms"] for run in runs if run.result.get("latency_ms")), None)
    if timed is None:
        return note
    return note + (
        f" Latency: {timed['batch']} images per pass, {timed['device']}, {timed['precision']}; median of 15 passes, before "
        "and after pruning in turns; of a fine-tuned network, those of its pruning."
    )


def ratios(outcomes: list[Outcome]) -> Table:
    """One row per tested pruning: what was asked, what was removed, and the accuracy from step to step."""
    head = ["setting", "asked", "removed", "restored", "before pruning (%)", "before calibration (%)"]
    head += ["calibrated or repaired (%)", "fine-tuned (%)", "parameters", "MACs (M)", "latency (ms)"]
    rows = []
    for outcome in (o for o in outcomes if o.kind is Kind.BEFORE_CALIBRATION and o.accuracies):
        runs = outcome.runs
        calibrated = [o for o in outcomes if o.kind in (Kind.CALIBRATED, Kind.REPAIRED) and o.runs == runs]
        tuned = [o for o in outcomes if o.kind is Kind.FINETUNED and any(run.parent in runs for run in o.runs)]
        asked = outcome.first.result["ratio"].get("asked")
        rows.append(
            [
                words.setting(outcome.first),
                "-" if asked is None else f"{asked:g}",
                words.average((run.removed for run in runs), lambda v: f"{v:.1%}"),
                words.average((plan_count(run.result, "restored") for run in runs), lambda v: f"{v:g}"),
                words.percent(run.metric("test", "_before") for run in runs),
                words.percent(outcome.accuracies),
                *(" / ".join(words.percent(o.accuracies) for o in found) or "-" for found in (calibrated, tuned)),
                words.average((run.result["cost"]["num_params"] for run in runs), words.count),
                words.average((run.result["cost"]["macs"] for run in runs), words.millions),
                words.latency(runs),
            ]
        )
    return Table(head, rows)


def architectures(prunings: list[Run]) -> Table:
    rows = [[*architecture_name(run), json.dumps(run.result["widths"]).replace('"', "")] for run in prunings]
    return Table(["setting", "seed", "removed", "channels of every BatchNorm (M: max pooling)"], rows, left=4)


def architecture_name(run: Run) -> tuple[str, str, str]:
    return words.setting(run), str(run.chain[0].result.get("seed", "-")), f"{run.removed:.1%}"


def passes(runs: list[Run]) -> Table:
    """One row per pass of a multi-pass chain, as in the paper's Table 4."""
    parents = {x for run in runs for x in run.chain[:-1]}
    head = ["pass", "trained (%)", "before calibration (%)", "calibrated (%)", "fine-tuned (%)", "parameters", "MACs"]
    rows = []
    for last in (run for run in runs if run not in parents and run.passes > 1):
        for run in last.prunings:
            trained = next((r for r in reversed(run.chain[:-1]) if r.role == "sparse"), None)
            tuned = next((r for r in last.chain if r.role == "finetuned" and r.passes == run.passes), None)
            accuracies = [trained and trained.metric("test"), run.metric("test", "_pruned"), run.metric("test")]
            row = [str(run.passes), *(words.percent([a]) for a in [*accuracies, tuned and tuned.metric("test")])]
            rows.append([*row, *(words.cost([run], key, words.count) for key in ("num_params", "macs"))])
    return Table(head, rows)


def published(runs: list[Run]) -> Table:
    """What others have published for the same network and data set."""
    head = ["source", "removed", "baseline (%)", "before calibration (%)", "fine-tuned (%)", "remark"]
    first = next((run for run in runs if run.dense), None)
    found = first and published_for(first.result["model"], first.result.get("data"), first.dense["num_params"])
    rows = [
        [source, removed, *("-" if value is None else f"{value:.2f}" for value in values), remark]
        for source, removed, *values, remark in found or []
    ]
    return Table(head, rows, left=2)


def spreadsheet(found: Collection, folder: Path) -> Table:
    """One row per finished run; accuracies and mean average precisions in [0, 1]."""
    rows = []
    for run in found.runs:
        r, m, timed, ratio = (
            run.result,
            run.result["metrics"],
            run.result.get("latency_ms") or {},
            run.result.get("ratio"),
        )
        row = {key: r.get(key) for key in CSV} | r["cost"]
        row |= {"run": run.folder.relative_to(folder).as_posix(), "sparsity": r["config"].get("sparsity")}
        row |= {"penalty": run.penalty if row["sparsity"] else None}
        row |= {f"ratio_{key}": (ratio or {}).get(key) for key in ("asked", "got")}
        row |= {name: plan_count(r, name) for name in ("restored", "dead")}
        row |= {key: m.get(key.replace("_", "/", 1)) for key in CSV if key.startswith(("test_", "val_"))}
        row |= {f"latency_{key}_ms": timed.get(key) for key in ("before", "after")}
        row |= {"latency_device": timed.get("device"), "epochs": run.epochs or None}
        rows.append(["" if row[key] is None else row[key] for key in CSV])
    return Table([*CSV], rows)
