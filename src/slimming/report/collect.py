"""Reading result.json files of any age and from any machine: what cannot be used is listed, not raised."""

import itertools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slimming.records import RESULT_FORMAT, ROLES
from slimming.report.runs import Run

NEEDED = {"role": str, "model": str, "metrics": dict, "cost": dict, "config": dict}
OPTIONAL = {"seed": int, "data": str, "parent": str, "n_test": int, "history": list, "plan": dict, "criterion": dict}
OPTIONAL |= {"gammas": dict, "latency_ms": dict, "latency": dict}


@dataclass
class Collection:
    """All runs below a folder.

    Attributes:
        failed: (folder, stage, error) of runs that say so themselves.
        unusable: (file, why) of files that are not results of ours.
    """

    runs: list[Run] = field(default_factory=list)
    failed: list[tuple[str, str, str]] = field(default_factory=list)
    unusable: list[tuple[str, str]] = field(default_factory=list)


def collect(folder: Path) -> Collection:
    """Read all result.json files below a folder, sorted by path, and link each run to the one it came from."""
    found = Collection()
    for path in sorted(folder.rglob("result.json"), key=_natural):
        name = str(path.parent.relative_to(folder))
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            found.unusable.append((f"{name}/result.json", f"not readable: {error}"))
            continue
        if isinstance(result, dict) and result.get("stage") == "export" and result.get("status") == "finished":
            continue  # no network of its own: the same one in another format
        if why := _fault(result):
            found.unusable.append((f"{name}/result.json", why))
        elif result["status"] == "failed":
            found.failed.append((name, str(result.get("stage")), str(result.get("error"))))
        else:
            found.runs.append(Run(path.parent, result))
    by_folder = {os.path.realpath(run.folder): run for run in found.runs}
    for run in found.runs:
        if parent := run.result.get("parent"):
            run.parent = by_folder.get(os.path.dirname(os.path.realpath(run.folder / parent)))
    for run in found.runs:
        _cut_circle(run)
    return found


def _natural(path: Path) -> list:
    """Sort key: numbers in a path count as numbers, so that job 10 comes after job 9."""
    parts = "".join(c if c.isdigit() else f" {c} " for c in str(path)).split()
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts]


def _fault(result: Any) -> str:
    """Return why a file's content is not a result, "" if it is one."""
    if not isinstance(result, dict) or "format" not in result:
        return "not a result of ours"
    if result["format"] != RESULT_FORMAT:
        return f"format {result['format']!r}, this version reads {RESULT_FORMAT}"
    if result.get("status") == "failed":
        return ""
    if result.get("status") != "finished":
        return f"status {result.get('status')!r} is neither finished nor failed"
    return _wrong_kind(result) or _wrong_numbers(result) or _wrong_series(result)


def _wrong_kind(result: dict) -> str:
    for key, kind in NEEDED.items():
        if not isinstance(result.get(key), kind):
            return f"incomplete: {key} is {'missing' if key not in result else 'of another kind'}"
    for key, kind in OPTIONAL.items():
        if not isinstance(result.get(key), kind | None):
            return f"incomplete: {key} is of another kind"
    if "\0" in (result.get("parent") or ""):
        return "incomplete: parent is no path"
    return "" if result["role"] in ROLES else f"unknown role {result['role']!r}"


def _wrong_numbers(result: dict) -> str:
    pruned = result["role"] == "pruned"
    if not all(isinstance(value, float | int | None) for value in result["metrics"].values()):
        return "incomplete: metrics are not numbers"
    for key in ("cost", "cost_before") if pruned or result.get("cost_before") else ("cost",):
        cost = result.get(key)
        if not isinstance(cost, dict) or not all(isinstance(cost.get(k), int) for k in ("num_params", "macs")):
            return f"incomplete: {key} needs num_params and macs"
    sparsity, target = result["config"].get("sparsity"), result["config"].get("target_ratio")
    if not isinstance(target if sparsity == "auto" else sparsity or 0, float | int):
        return "incomplete: sparsity in config is of another kind"
    ratio = result.get("ratio")
    if pruned and not (isinstance(ratio, dict) and isinstance(ratio.get("got"), float | int)):
        return "incomplete: ratio needs asked and got"
    if pruned and not isinstance(ratio.get("asked"), float | int | None):
        return "incomplete: ratio asked is not a number"
    return ""


def _wrong_series(result: dict) -> str:
    """Look at what pictures are drawn of: histories, histograms, widths, latencies; all of them may be missing."""
    gammas, latency = result.get("gammas") or {}, result.get("latency_ms")
    edges, counts = gammas.get("edges", [0.0, 1.0]), gammas.get("counts", [])
    fitting = isinstance(edges, list) and isinstance(counts, list) and len(edges) > 1
    if not fitting or not _increasing(edges) or not all(_numbers(row, len(edges) - 1) for row in counts):
        return "incomplete: gammas is of another kind"
    rows = result.get("history") or []
    if not all(isinstance(row, dict) and _numbers([row.get("epoch"), *row.values()]) for row in rows):
        return "incomplete: history is of another kind"
    if latency and not (_numbers([latency.get(k) for k in ("before", "after")]) and latency["before"] > 0):
        return "incomplete: latency_ms is of another kind"
    budget = result.get("latency")
    if budget and not (
        _numbers([budget.get(k) for k in ("asked", "delivered")]) and isinstance(budget.get("engine"), str)
    ):
        return "incomplete: latency is of another kind"
    for key in ("widths", "widths_before"):
        widths = result.get(key)
        if widths is not None and not (isinstance(widths, list) and _numbers([w for w in widths if w != "M"])):
            return f"incomplete: {key} is of another kind"
    return ""


def _numbers(values: Any, count: int | None = None) -> bool:
    """Tell whether a value is a list of numbers, and of so many; NaN is one: it is the loss of a training that diverged."""
    return isinstance(values, list) and all(isinstance(v, float | int) for v in values) and count in (None, len(values))


def _increasing(edges: list) -> bool:
    return _numbers(edges) and edges[0] >= 0 and all(a < b for a, b in itertools.pairwise(edges))


def _cut_circle(run: Run) -> None:
    """Forget a parent that leads back to its child (two copied folders can do that)."""
    seen, now = {run}, run
    while now.parent is not None:
        if now.parent in seen:
            now.parent = None
            return
        seen.add(now.parent)
        now = now.parent
