"""Latencies of networks in engines, from bench.json files: tables, a picture, and ratios that compare like with like."""

import json
from pathlib import Path
from typing import Any

from slimming.errors import DataError
from slimming.report.document import Section, Table
from slimming.report.drawing import DARK, GREY, LIGHT, MIDDLE, pyplot, save_figure

BENCH = "bench.json"
BENCH_FORMAT = 1
COLOURS = {"torch": GREY, "compile": LIGHT, "onnxruntime": DARK, "openvino": MIDDLE}
ROW = {"model": str, "engine": str, "batch": int, "threads": int, "median_ms": float, "quartiles_ms": list}
MACHINE = {"cpu": str, "flags": list, "cores": int, "engines": dict}
QUIET = 0.9  # share of a core below which other processes were at work


def difference(here: dict[str, Any], there: dict[str, Any], engine: str) -> str:
    """Say in what two machines differ that a latency in an engine depends on; "" where they are alike.

    Args:
        here, there: as `deploy.timing.machine` describes them.
    """
    found = [f"{key}: {here[key]} and {there[key]}" for key in ("cpu", "flags", "cores") if here[key] != there[key]]
    versions = [machine["engines"].get(engine) for machine in (here, there)]
    if versions[0] != versions[1]:
        found.append(f"{engine}: {versions[0]} and {versions[1]}")
    return "; ".join(found)


def times_as_fast(row: dict[str, Any], base: dict[str, Any], machine: dict[str, Any], other: dict[str, Any]) -> float:
    """Return how many times as fast as `base`, measured on `other`, a row is, measured on `machine`.

    Raises:
        DataError: on different machines, with another batch or another number of threads: the ratio would not be of the
            networks.
    """
    unlike = [f"{key}: {row[key]} and {base[key]}" for key in ("batch", "threads") if row[key] != base[key]]
    for engine in {row["engine"], base["engine"]}:
        unlike += [found] if (found := difference(machine, other, engine)) else []
    if unlike:
        raise DataError(
            f"the latencies of {row['model']} and {base['model']} cannot be put into a ratio, as they were measured "
            f"differently ({'; '.join(dict.fromkeys(unlike))}): time both with bench.py in one go"
        )
    if len(row.get("turns_ms", [])) == len(base.get("turns_ms", [])) > 0 and row.get("set") == base.get("set"):
        ratios = sorted(b / a for a, b in zip(row["turns_ms"], base["turns_ms"], strict=True))
        middle = len(ratios) // 2
        return ratios[middle] if len(ratios) % 2 else (ratios[middle - 1] + ratios[middle]) / 2
    return base["median_ms"] / row["median_ms"]


def describe(machine: dict[str, Any]) -> str:
    """Name a machine: `AMD EPYC (avx2, avx512_vnni), 2 cores; onnxruntime 1.32.0`."""
    flags = f" ({', '.join(machine['flags'])})" * bool(machine["flags"])
    versions = {name: value for name, value in machine["engines"].items() if name != "compile"}  # torch's own
    engines = ", ".join(f"{name} {value}" for name, value in versions.items())
    return f"{machine['cpu']}{flags}, {machine['cores']} core{'s' * (machine['cores'] > 1)}; {engines}"


def read(path: Path) -> dict[str, Any]:
    """Read a bench.json.

    Raises:
        DataError: it is not one, with the reason.
    """
    try:
        bench = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not readable: {error}") from error
    if not isinstance(bench, dict) or bench.get("format") != BENCH_FORMAT:
        raise DataError(f"{path} is not a {BENCH} of format {BENCH_FORMAT}")
    machine, rows = bench.get("machine"), bench.get("rows")
    whole = isinstance(rows, list) and bool(rows) and all(_fits(row, ROW) and row["median_ms"] > 0 for row in rows)
    if not whole or not _fits(machine, MACHINE):
        raise DataError(f"{path} is incomplete or of another kind")
    return bench


def _fits(found: Any, kinds: dict[str, type]) -> bool:
    if not isinstance(found, dict) or not all(isinstance(found.get(key), kind) for key, kind in kinds.items()):
        return False
    quartiles = found.get("quartiles_ms", [0.0, 0.0])
    return len(quartiles) == 2 and all(isinstance(q, float) for q in quartiles)


def table(bench: dict[str, Any]) -> Table:
    """One row per network, engine, number of threads and batch; the first of each kind is what the others are compared to."""
    head = ["model", "engine", "threads", "batch", "ms per pass", "quartiles", "images/s", "times as fast as the first"]
    rows, machine = [], bench["machine"]
    for row in bench["rows"]:
        kin = [r for r in bench["rows"] if (r["batch"], r["threads"]) == (row["batch"], row["threads"])]
        ratio = times_as_fast(row, kin[0], machine, machine)
        low, high = row["quartiles_ms"]
        speed = f"{1000 * row['batch'] / row['median_ms']:,.0f}"
        cells = [f"{row['median_ms']:.3g}", f"{low:.3g} - {high:.3g}", speed, f"{ratio:.2f}"]
        rows.append([row["model"], row["engine"], row["threads"], row["batch"], *cells])
    return Table(head, rows, left=2)


def note(bench: dict[str, Any]) -> str:
    """Say where and how a bench was made, and whether the machine was busy with something else."""
    turns = len(bench["rows"][0].get("turns_ms", []))
    text = f"{describe(bench['machine'])}. Medians of {turns} turns that all networks took one after another."
    share = bench.get("core_share", 1.0)
    if share < QUIET:
        text += (
            f" Other processes were at work: a thread got {share:.0%} of its core. Ratios hold better than milliseconds; "
            "measure again on a quiet machine."
        )
    return text


def figure(bench: dict[str, Any], path: Path) -> None:
    """Draw the median latencies with their quartiles: a panel per batch and number of threads, a bar per network and engine."""
    plt = pyplot()
    panels = list(dict.fromkeys((row["batch"], row["threads"]) for row in bench["rows"]))
    names = list(dict.fromkeys((row["model"], row["engine"]) for row in bench["rows"]))
    size = (2.4 + 3.2 * len(panels), 1.4 + 0.32 * len(names))
    drawn, row_of_axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axes, (batch, threads) in zip(row_of_axes[0], panels, strict=True):
        for row in (r for r in bench["rows"] if (r["batch"], r["threads"]) == (batch, threads)):
            low, high = row["quartiles_ms"]
            middle = row["median_ms"]
            error = [[max(0.0, middle - low)], [max(0.0, high - middle)]]
            place = names.index((row["model"], row["engine"]))
            style = {"color": COLOURS.get(row["engine"], GREY), "ecolor": "black", "capsize": 2}
            axes.barh(place, middle, xerr=error, **style)
        axes.set(xlabel="ms per pass", title=f"batch {batch}, {threads} thread{'s' * (threads > 1)}")
        axes.set_xlim(left=0)
        axes.grid(axis="x", alpha=0.3)
    row_of_axes[0][0].set_yticks(range(len(names)), [f"{model} ({engine})" for model, engine in names], fontsize=8)
    row_of_axes[0][0].invert_yaxis()
    save_figure(drawn, path)


def collect(folder: Path) -> tuple[dict[str, dict[str, Any]], list[tuple[str, str]]]:
    """Read all bench.json files below a folder, by the folder they lie in; and return (file, why) of those of no use."""
    benches, unusable = {}, []
    for path in sorted(folder.rglob(BENCH)):
        name = path.parent.relative_to(folder).as_posix()
        try:
            benches[name] = read(path)
        except DataError as error:
            unusable.append((f"{name}/{BENCH}", str(error)))
    return benches, unusable


def sections(benches: dict[str, dict[str, Any]], pictures: Path) -> list[Section]:
    """Return the section of all benches, none where there are none; each has a table of its own.

    So no latency is put into a ratio with one of another machine.
    """
    parts: list = []
    for number, (name, bench) in enumerate(benches.items()):
        picture = pictures / f"latencies_{number}.png"
        figure(bench, picture)
        parts += [f"{name}: {note(bench)}", picture, table(bench)]
    return [Section("latencies in engines", parts)] if parts else []
