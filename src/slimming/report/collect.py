"""Reading result.json files: of any age and from any machine; what cannot be used is told, not raised."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slimming.records import what_matters

ROLES = ("baseline", "sparse", "pruned", "finetuned", "scratch")


@dataclass
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
    def accuracy(self) -> float | None:
        return self.result["metrics"].get("test/acc")

    @property
    def chain(self) -> list["Run"]:
        """This run and those that it came from, the first first."""
        return [*(self.parent.chain if self.parent else []), self]

    def nearest(self, role: str) -> "Run | None":
        """Return the last run of a role in the chain."""
        return next((run for run in reversed(self.chain) if run.role == role), None)

    @property
    def sparsity(self) -> float | None:
        run = self.nearest("sparse")
        return run and run.result["config"].get("sparsity")

    @property
    def dense(self) -> dict[str, Any] | None:
        """{num_params, macs} of the network before any pruning, as far back as is known."""
        first = self.chain[0].result
        return first.get("cost_before") or (first["cost"] if first["role"] in ("baseline", "sparse") else None)

    @property
    def identity(self) -> str:
        """What this run and those before it were told, but for seeds and places: equal for repetitions of one experiment."""
        first = self.chain[0]
        unknown = first.result.get("parent") if first.parent is None else None
        return json.dumps([unknown, *(_told(run.result["config"]) for run in self.chain)], sort_keys=True)

    @property
    def seeds(self) -> tuple:
        return tuple(run.result.get("seed") for run in self.chain)

    @property
    def passes(self) -> int:
        return sum(run.role == "pruned" for run in self.chain)


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
        if why := _fault(result):
            found.unusable.append((f"{name}/result.json", why))
        elif result["status"] == "failed":
            found.failed.append((name, str(result.get("stage")), str(result.get("error"))))
        else:
            found.runs.append(Run(path.parent, result))
    places = {os.path.realpath(run.folder): run for run in found.runs}
    for run in found.runs:
        if parent := run.result.get("parent"):
            run.parent = places.get(os.path.dirname(os.path.realpath(run.folder / parent)))
    for run in found.runs:
        _cut_circle(run)
    return found


def _told(config: dict[str, Any]) -> dict[str, Any]:
    told = {key: value for key, value in what_matters(config).items() if key not in ("seed", "data.seed")}
    data = config.get("data")
    root = data.get("root") if isinstance(data, dict) else None
    return told | ({"data.root": Path(str(root)).name} if root else {})  # which data, not where


def _natural(path: Path) -> list:
    """Sort key: numbers in a path count as numbers, so that job 10 comes after job 9."""
    parts = "".join(c if c.isdigit() else f" {c} " for c in str(path)).split()
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts]


def _fault(result: Any) -> str:
    """Return why a file's content is not a result, "" if it is one."""
    if not isinstance(result, dict) or "format" not in result:
        return "not a result of ours"
    if result["format"] != 1:
        return f"format {result['format']!r}, this version reads 1"
    if result.get("status") == "failed":
        return ""
    if result.get("status") != "finished":
        return f"status {result.get('status')!r} is neither finished nor failed"
    wanted = {"role": str, "model": str, "metrics": dict, "cost": dict, "config": dict}
    for key, kind in wanted.items():
        if not isinstance(result.get(key), kind):
            return f"incomplete: {key} is {'missing' if key not in result else 'of another kind'}"
    for key, kind in {"seed": int, "data": str, "parent": str, "n_test": int, "history": list}.items():
        if not isinstance(result.get(key), kind | None):
            return f"incomplete: {key} is of another kind"
    if not all(isinstance(value, float | int | None) for value in result["metrics"].values()):
        return "incomplete: metrics are not numbers"
    if result["role"] not in ROLES:
        return f"unknown role {result['role']!r}"
    costs = ("cost", "cost_before") if result["role"] == "pruned" else ("cost",)
    for key in costs:
        cost = result.get(key)
        if not isinstance(cost, dict) or not all(isinstance(cost.get(k), int) for k in ("num_params", "macs")):
            return f"incomplete: {key} needs num_params and macs"
    ratio = result.get("ratio")
    if result["role"] == "pruned" and not (isinstance(ratio, dict) and isinstance(ratio.get("got"), float | int)):
        return "incomplete: ratio needs asked and got"
    return ""


def _cut_circle(run: Run) -> None:
    """Forget a parent that leads back to its child (two copied folders can do that)."""
    seen, now = {id(run)}, run
    while now.parent is not None:
        if id(now.parent) in seen:
            now.parent = None
            return
        seen.add(id(now.parent))
        now = now.parent
