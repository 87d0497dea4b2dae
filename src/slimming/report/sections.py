"""What a report says: sections of paragraphs, tables and figures, made from the collected runs alone."""

import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from slimming.report import comparisons
from slimming.report.collect import Collection, Run
from slimming.report.published import published_for


@dataclass
class Table:
    head: list[str]
    rows: list[list[str]]


@dataclass
class Section:
    title: str
    parts: list[str | Table | Path] = field(default_factory=list)  # paragraphs, tables, pictures


def sections(found: Collection, pictures: Path) -> list[Section]:
    """Return all sections that the runs have data for; figures go into the folder `pictures`."""
    made = []
    for title, runs in _by_network(found.runs).items():
        made += [
            _stages(title, runs),
            _sweep(title, runs, pictures),
            _architectures(title, runs, pictures),
            _gammas(title, runs, pictures),
            _curves(title, runs, pictures),
            _passes(title, runs),
            _published(title, runs),
        ]
    made.append(_troubles(found))
    return [section for section in made if section is not None and section.parts]


def _by_network(runs: Iterable[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        size = f", {run.dense['num_params']:,} parameters dense" if run.dense else ""
        groups.setdefault(f"{run.result['model']} on {run.result.get('data')}{size}", []).append(run)
    return groups


# --- words for runs -----------------------------------------------------------------------------------------------------


def settings(run: Run) -> str:
    """Name what a pruning was told, but for the ratio: `lambda 0.0005, max_layer_ratio 0.9`."""
    pruned = run.nearest("pruned")
    if pruned is None:
        return ""
    config, criterion = pruned.result["config"], pruned.result.get("criterion", {})
    sparse = run.nearest("sparse")
    words = [_training(sparse)] if sparse else []
    kind = criterion.get("criterion", "GlobalRatio")
    if kind != "GlobalRatio":
        values = [
            f"{k} {v:g}" for k, v in criterion.items() if k not in ("criterion", "ratio") and not isinstance(v, str)
        ]
        words.append(" ".join([kind, *values]))
    defaults = {"ties": "together", "score": "gamma", "reduce": "max", "convention": "exact"}
    defaults |= {"min_channels": 1, "max_layer_ratio": 1.0, "round_to": 1, "ignore": []}
    words += [f"{k} {config[k]}" for k, default in defaults.items() if config.get(k, default) != default]
    if run.passes > 1:
        words.append(f"pass {run.passes}")
    return ", ".join(words)


def _training(run: Run) -> str:
    """Name a sparse training: `lambda 0.0005, 20 epochs`."""
    epochs = len(run.result.get("history") or [])
    return f"lambda {run.result['config'].get('sparsity', 0):g}" + (f", {epochs} epochs" if epochs else "")


def _ratio(run: Run) -> str:
    pruned = run.nearest("pruned")
    return "" if pruned is None else f"{pruned.result['ratio']['got']:.1%}"


def _got(run: Run) -> float | None:
    pruned = run.nearest("pruned")
    return pruned and pruned.result["ratio"]["got"]


def _asked(run: Run) -> float | None:
    pruned = run.nearest("pruned")
    return pruned and pruned.result["ratio"].get("asked")


def percent(values: Iterable[float | None]) -> str:
    """Write accuracies in [0, 1] as `81.40`, or as `81.40 ± 0.21 (n=3)`; "-" for none."""
    known = [100 * v for v in values if v is not None]
    if not known:
        return "-"
    mean = f"{statistics.mean(known):.2f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.2f} (n={len(known)})"


def _cut(value: int, run: Run, key: str) -> str:
    return f" (-{1 - value / run.dense[key]:.1%})" if run.dense and run.passes else ""


def _mean(values: Iterable[float | None], form: Callable[[float], str]) -> str:
    known = [v for v in values if v is not None]
    return form(statistics.mean(known)) if known else "-"


# --- 1. the stages ------------------------------------------------------------------------------------------------------


def _stages(title: str, runs: list[Run]) -> Section:
    """Accuracy and costs per kind of network, over seeds; of the prunings only those that were trained further, if any."""
    further = {id(x) for r in runs for x in r.chain if r.role in ("finetuned", "scratch")}
    if any(r.role == "pruned" and id(r) in further for r in runs):
        runs = [r for r in runs if r.role != "pruned" or id(r) in further]
    groups: dict[tuple, dict[tuple, tuple[Run, float | None]]] = {}
    for run in runs:
        for name, accuracy in _rows_of(run):
            groups.setdefault((name, run.identity), {})[run.seeds] = (run, accuracy)
    rows = []
    for (name, _), seeds in sorted(
        groups.items(), key=lambda item: _order(next(iter(item[1].values()))[0], item[0][0])
    ):
        members = list(seeds.values())
        timed = [t for run, _ in members if (t := _latency(run))]
        of = [run.result for run, _ in members]
        run, cost = members[0][0], {k: round(statistics.mean(r["cost"][k] for r in of)) for k in ("num_params", "macs")}
        rows.append(
            [
                name,
                _mean((_got(run) for run, _ in members), lambda v: f"{v:.1%}"),
                percent(a for _, a in members),
                f"{cost['num_params']:,}{_cut(cost['num_params'], run, 'num_params')}",
                f"{cost['macs'] / 1e6:,.2f}{_cut(cost['macs'], run, 'macs')}",
                f"{2 * cost['macs'] / 1e6:,.2f}",
                _mean((r.get("activation_bytes") for r in of), lambda v: f"{v / 1e3:,.0f}"),
                _mean((r.get("size_bytes") for r in of), lambda v: f"{v / 1e6:.2f}"),
                " -> ".join(_mean((t[k] for t in timed), lambda v: f"{v:.1f}") for k in ("before", "after"))
                if timed
                else "-",
            ]
        )
    head = ["network", "channels removed", "test accuracy (%)", "parameters", "MACs (M)", "FLOPs (M)"]
    head += ["activations (kB/image)", "weights (MB)", "latency (ms)"]
    notes = ["Accuracy of the last epoch; several seeds: mean ± standard deviation. FLOPs = 2 x MACs, of one image."]
    if timed := next((r.result["latency_ms"] for r in runs if r.result.get("latency_ms")), None):
        notes.append(
            f"Latency: {timed['batch']} images per pass, {timed['device']}, {timed['precision']}; median of 15 passes, before "
            "and after pruning in turns; of a fine-tuned network, those of its pruning."
        )
    return Section(f"{title}: stages", [" ".join(notes), Table(head, rows)])


def _rows_of(run: Run) -> list[tuple[str, float | None]]:
    """Return (name of the row, accuracy) for a run; a pruning gives two, right after the surgery and calibrated."""
    what = f"pruned, {_goal(run)} [{settings(run)}]" if run.passes else ""
    if run.result.get("parent") and run.parent is None:
        what = f"{what} from a run that is not here".strip()
    if run.role == "pruned":
        metrics, batches = run.result["metrics"], run.result["config"].get("calibrate", {}).get("batches")
        rows = [(f"{what}: at once", metrics.get("test/acc_pruned"))]
        return rows + [(f"{what}: calibrated", metrics.get("test/acc"))] * bool(batches)
    if run.role in ("finetuned", "scratch"):
        kind = "fine-tuned" if run.role == "finetuned" else "from scratch"
        tuning = run.result["config"].get("finetune", {})
        more = f", {len(run.result.get('history') or [])} epochs"
        more += ", distilled" if tuning.get("distill", {}).get("teacher") else ""
        return [(f"{what or 'not pruned'}: {kind}{more}", run.accuracy)]
    word = "baseline" if run.role == "baseline" else f"sparse, {_training(run)}"
    if run.role == "baseline" and run.result.get("history"):
        word += f", {len(run.result['history'])} epochs"
    return [(word if not run.passes else f"{what}: then {word}", run.accuracy)]


def _goal(run: Run) -> str:
    asked = _asked(run)
    return f"ratio {asked:g}" if asked is not None else f"{_got(run):.1%} removed"


def _order(run: Run, name: str) -> tuple:
    place = {"baseline": 0, "sparse": 1}.get(run.role, 2) if not run.passes else 2
    kinds = ("at once", "calibrated", "fine-tuned", "from scratch")
    kind = next((i for i, word in enumerate(kinds) if word in name), 9)
    told = settings(run) if run.passes else name
    return (run.passes, place, len(told), told, _asked(run) or 0, _got(run) or 0, kind)


def _latency(run: Run) -> dict[str, float] | None:
    pruned = run.nearest("pruned")
    return pruned.result.get("latency_ms") if pruned is not None else None


# --- 2. to 7. -----------------------------------------------------------------------------------------------------------


def _prunings(runs: list[Run]) -> list[Run]:
    """Return the tested prunings, in the order of the stages' table."""
    tested = [r for r in runs if r.role == "pruned" and "test/acc_pruned" in r.result["metrics"]]
    return sorted(tested, key=lambda r: _order(r, ""))


def _tuned(runs: list[Run]) -> dict[int, float]:
    """Return the mean accuracy after fine-tuning by id of the pruning."""
    found: dict[int, list[float]] = {}
    for run in runs:
        if run.role == "finetuned" and run.parent and run.parent.role == "pruned" and run.accuracy is not None:
            found.setdefault(id(run.parent), []).append(run.accuracy)
    return {key: statistics.mean(values) for key, values in found.items()}


def _sweep(title: str, runs: list[Run], pictures: Path) -> Section | None:
    tested, tuned = _prunings(runs), _tuned(runs)
    if len({r.result["ratio"]["got"] for r in tested}) < 2:
        return None
    head = ["asked", "removed", "setting", "put back", "before (%)", "at once (%)", "calibrated (%)", "fine-tuned (%)"]
    rows = []
    for run in tested:
        r, m = run.result, run.result["metrics"]
        latency = r.get("latency_ms")
        rows.append(
            [
                "-" if r["ratio"].get("asked") is None else f"{r['ratio']['asked']:g}",
                _ratio(run),
                settings(run) + ("" if r["seed"] == 1 else f" (seed {r['seed']})"),
                str(r.get("plan", {}).get("put_back", "-")),
                percent([m.get("test/acc_before")]),
                percent([m["test/acc_pruned"]]),
                percent([m["test/acc"]]),
                percent([tuned.get(id(run))]),
                f"{r['cost']['num_params']:,}",
                f"{r['cost']['macs'] / 1e6:,.2f}",
                f"{latency['before']:.1f} -> {latency['after']:.1f}" if latency else "-",
            ]
        )
    parts: list = [Table([*head, "parameters", "MACs (M)", "latency (ms)"], rows)]
    curves: dict[str, list[Run]] = {}
    for run in tested:
        curves.setdefault(settings(run) or "pruned", []).append(run)
    lines = sorted(((k, v) for k, v in curves.items() if len(v) > 2), key=lambda item: -len(item[1]))
    if lines:
        path = pictures / f"sweep_{_slug(title)}.png"
        comparisons.sweep(dict(lines[: len(comparisons.LINES)]), tuned, path)
        parts.insert(0, path)
    return Section(f"{title}: accuracy against the ratio", parts)


def _architectures(title: str, runs: list[Run], pictures: Path) -> Section | None:
    shown = [r for r in runs if r.role == "pruned" and isinstance(r.result.get("widths_before"), list)]
    shown = sorted(shown, key=lambda r: _order(r, ""))
    if not shown:
        return None
    rows = [[_ratio(r), settings(r), json.dumps(r.result["widths"]).replace('"', "")] for r in shown]
    names = [f"{_ratio(r)} [{settings(r)}]" for r in shown]
    picture = pictures / f"kept_{_slug(title)}.png"
    lengths = {len(r.result["widths"]) for r in shown} | {len(r.result["widths_before"]) for r in shown}
    parts: list = [Table(["removed", "setting", "channels of every BatchNorm (M: max pooling)"], rows)]
    if len(lengths) == 1:
        dense = {id(r): next(x for x in r.chain if x.role == "pruned").result["widths_before"] for r in shown}
        comparisons.kept([(n, dense[id(r)], r.result["widths"]) for n, r in zip(names, shown, strict=True)], picture)
        parts.insert(0, picture)
    return Section(f"{title}: architectures", parts)


def _gammas(title: str, runs: list[Run], pictures: Path) -> Section | None:
    parts: list = []
    for number, run in enumerate(r for r in runs if r.role == "sparse" and "counts" in r.result.get("gammas", {})):
        children = [r for r in runs if r.parent is run and r.role == "pruned" and "gammas" in r.result]
        path = pictures / f"gammas_{_slug(title)}_{number}.png"
        comparisons.thresholds(run, children, path)
        where = f", pass {run.passes + 1}" if run.passes else ""
        lines = "; dashed: the thresholds of its prunings" if children else ""
        text = f"lambda {run.result['config'].get('sparsity'):g}, seed {run.result.get('seed')}{where}{lines}."
        parts += [text, path]
    return Section(f"{title}: distribution of |gamma| after sparse training", parts)


def _curves(title: str, runs: list[Run], pictures: Path) -> Section | None:
    trained = [r for r in runs if r.result.get("history")]
    parents = {id(x) for r in trained for x in r.chain[:-1]}
    parts: list = []
    for number, last in enumerate(r for r in trained if id(r) not in parents):
        stages = [r for r in last.chain if r.result.get("history")] if last.role != "scratch" else [last]
        titles = [{"finetuned": "fine-tuned", "scratch": "from scratch"}.get(r.role, r.role) for r in stages]
        path = pictures / f"curves_{_slug(title)}_{number}.png"
        comparisons.timeline(list(zip(titles, stages, strict=True)), path)
        parts += [f"{_rows_of(last)[0][0]}, seed {last.result.get('seed')}.", path]
    return Section(f"{title}: loss and accuracy of all stages", parts)


def _passes(title: str, runs: list[Run]) -> Section | None:
    """One line per pass of a multi-pass chain, as in the paper's Table 4."""
    parents = {id(x) for r in runs for x in r.chain[:-1]}
    rows = []
    for last in (r for r in runs if id(r) not in parents and r.passes > 1):
        for run in (r for r in last.chain if r.role == "pruned"):
            trained = next((r for r in reversed(run.chain[:-1]) if r.role == "sparse"), None)
            tuned = next((r for r in last.chain if r.role == "finetuned" and r.passes == run.passes), None)
            metrics, cost = run.result["metrics"], run.result["cost"]
            row = [str(run.passes), percent([trained and trained.accuracy]), percent([metrics.get("test/acc_pruned")])]
            row += [percent([metrics.get("test/acc")]), percent([tuned and tuned.accuracy])]
            rows.append([*row, *(f"{cost[k]:,}{_cut(cost[k], run, k)}" for k in ("num_params", "macs"))])
    head = ["pass", "trained (%)", "at once (%)", "calibrated (%)", "fine-tuned (%)", "parameters", "MACs"]
    return Section(f"{title}: passes", [Table(head, rows)]) if rows else None


def _published(title: str, runs: list[Run]) -> Section | None:
    first = next((r for r in runs if r.dense), None)
    if first is None:
        return None
    found = published_for(first.result["model"], first.result.get("data"), first.dense["num_params"])
    rows = [
        [source, setting, *("-" if v is None else f"{v:.2f}" for v in values), remark]
        for source, setting, *values, remark in found
    ]
    head = ["source", "removed", "baseline (%)", "at once (%)", "fine-tuned (%)", "remark"]
    text = "Published by others, not measured here:"
    return Section(f"{title}: published numbers", [text, Table(head, rows)]) if rows else None


def _troubles(found: Collection) -> Section | None:
    parts: list = []
    if found.failed:
        parts += [
            "These runs say of themselves that they failed:",
            Table(["run", "stage", "error"], [[*f] for f in found.failed]),
        ]
    if found.unusable:
        parts += ["These files were skipped:", Table(["file", "why"], [[*u] for u in found.unusable])]
    return Section("What failed, what was skipped", parts) if parts else None


def _slug(title: str) -> str:
    """Turn a title into a file name: `vgg19_on_cifar10_1255546`."""
    return "_".join("".join(c if c.isalnum() else " " for c in title.replace(",", "").split("param")[0]).split())
