"""Writes docs/options.md from the declarations of the options and the files of configs/: python docs/options.py"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from slimming.config import SCHEMAS
from slimming.config.help import Row, rows
from slimming.files import write_text

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
GROUPS = ("model", "data", "optimizer", "scheduler", "penalty", "trainer", "logger", "hydra/launcher")
INTRODUCTION = """# Options

This page is made by `python docs/options.py` from the declarations in `src/slimming/config/schema.py` and from the files of
`configs/`; a test compares them. `python <stage>.py --help` prints the same for one stage, with the values in force.

An option is given as `key=value`. `null` means "no value". An option of a group is given as `group.key=value`, another
file of a group as `group=file`. [stages.md](stages.md) says what the stages do.
"""
STAGES = {
    "train": "Beside them: the groups model, data, optimizer, scheduler, penalty, trainer, logger, and "
    "`experiment=<file>`, which sets several values at once.",
    "prune": "Beside them: the groups model, data, trainer (default: one_device) and logger. Values of model and data that are "
    "not given are those of the checkpoint. Give exactly one criterion: `ratio`, `budget.macs`, `budget.params`, "
    "`budget.latency` (with `runtime`), `threshold` or `criterion=optimal`.",
    "finetune": "Beside them: all groups of train.py. Every value of a group that is not given is that of the checkpoint's "
    "training.",
    "slim": "slim.py takes all options and groups of train.py and the options of prune.py as well; these are new or different:",
    "export": "Beside them: the groups model, data and logger. Values of model and data that are not given are those of the "
    "checkpoint.",
    "bench": "",
    "report": "",
}
LINE = re.compile(r"^(?P<indent> *)(?P<key>\w+):(?: (?P<value>[^#]*?))?(?: *# (?P<comment>.*))?$")


class Value(NamedTuple):
    """One line of a file of configs/."""

    key: str
    value: str
    comment: str


def values(path: Path) -> Iterator[Value]:
    """Yield the values of a YAML file with their comments, nested keys with dots; targets and defaults are left out."""
    above: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        found = LINE.match(line)
        if found and found["key"] not in ("_target_", "_partial_", "defaults"):
            above = [*above[: len(found["indent"]) // 2], found["key"]]
            yield Value(".".join(above), found["value"] or "", found["comment"] or "")


def group_table(group: str) -> list[str]:
    """Return the Markdown of a group: its files, and a row for every key and meaning."""
    files = {path.stem: list(values(path)) for path in sorted((CONFIGS / group).glob("*.yaml"))}
    merged: dict[tuple[str, str], dict[str, list[str]]] = {}  # (key, comment) -> value -> files
    for name, found in files.items():
        for key, value, comment in found:
            merged.setdefault((key, comment), {}).setdefault(value, []).append(name)
    lines = [f"### {group}", "", f"Files: {', '.join(f'`{name}`' for name in files)}.", ""]
    body = [
        (f"`{group.replace('/', '.')}.{key}`", _defaults(given, len(files)), comment)
        for (key, comment), given in merged.items()
    ]
    return lines + table(("key", "default", "meaning"), sorted(body)) + [""]


def _defaults(given: dict[str, list[str]], count: int) -> str:
    """Write the values of a key, each with its files where there is more than one value or not all files have the key."""
    where = {value: f" ({', '.join(names)})" * (len(names) < count) for value, names in given.items()}
    return "; ".join((f"`{value}`" if value else "") + names for value, names in where.items()).strip()


def experiments() -> list[str]:
    """Return the Markdown of the experiments: every file with the comment at its head."""
    folder = CONFIGS / "experiment"
    body = []
    for path in sorted(folder.rglob("*.yaml")):
        comments = [line[2:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
        name = path.relative_to(folder).with_suffix("").as_posix()
        body.append((f"`{name}`", " ".join(line for line in comments if not line.startswith("@"))))
    return ["### experiment", "", *table(("file", "what it sets"), body), ""]


def stage_table(stage: str, known: Iterable[Row]) -> list[str]:
    """Return the Markdown of a stage's options that are not among the `known` ones."""
    known = set(known)
    body = [[f"`{row.key}`", f"`{row.default}`", row.meaning, row.allowed] for row in rows(SCHEMAS[stage])]
    new = [cells for cells, row in zip(body, rows(SCHEMAS[stage]), strict=True) if row not in known]
    text = [STAGES[stage], ""] * bool(STAGES[stage])
    return [f"## {stage}.py", "", *text, *table(("option", "default", "meaning", "allowed"), new), ""]


def table(heads: Iterable[str], body: Iterable[Iterable[str]]) -> list[str]:
    lines = [list(heads), ["---"] * len(list(heads)), *body]
    return [f"| {' | '.join(_cell(text) for text in cells)} |" for cells in lines]


def _cell(text: str) -> str:
    """Write a text so that neither a bar ends the cell nor `<class>` is taken for HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def page() -> str:
    """Return docs/options.md."""
    both = [*rows(SCHEMAS["train"]), *rows(SCHEMAS["prune"])]
    lines = [INTRODUCTION]
    for stage in SCHEMAS:
        lines += stage_table(stage, both if stage == "slim" else ())
    lines += ["## Groups", "", "Values in brackets hold for the named files alone.", ""]
    for group in GROUPS:
        lines += group_table(group)
    lines += experiments()
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    write_text(Path(__file__).with_suffix(".md"), page())
