"""The options of a stage in words, from their declarations: for `--help` and for docs/options.md."""

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

WIDTH = 118  # characters of a line on the terminal


class Row(NamedTuple):
    """One option: its key, default and allowed values as the command line writes them, and what it means."""

    key: str
    default: str
    allowed: str
    meaning: str


def rows(schema: Any, prefix: str = "") -> Iterator[Row]:
    """Yield the options of a schema and of the schemas inside it; the groups of configs/ are left out."""
    for field in dataclasses.fields(schema):
        if isinstance(field.default_factory, type) and dataclasses.is_dataclass(field.default_factory):
            yield from rows(field.default_factory, f"{prefix}{field.name}.")
        elif "meaning" in field.metadata:
            default = field.default_factory() if field.default is dataclasses.MISSING else field.default
            yield Row(prefix + field.name, _value(default), _allowed(field), field.metadata["meaning"])


def help_text(schema: Any) -> str:
    """Return a table of the options for the terminal."""
    found = list(rows(schema))
    left = [f"  {row.key}={row.default}" for row in found]
    column = min(34, 2 + max(map(len, left)))
    lines = []
    for start, row in zip(left, found, strict=True):
        meaning = row.meaning + f" ({row.allowed})" * bool(row.allowed)
        first, *rest = textwrap.wrap(meaning, WIDTH - column, break_on_hyphens=False)
        lines += [f"{start:{column}}{first}"] if len(start) < column else [start, " " * column + first]
        lines += [" " * column + line for line in rest]
    return "\n".join(lines)


def _value(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _allowed(field: dataclasses.Field) -> str:
    """Say what is allowed where the meaning does not: `one of a, b`, `whole, >= 0`, `> 0, <= 1`."""
    allowed = field.metadata["allowed"]
    if "choices" in allowed:
        named = all(choice in field.metadata["meaning"] for choice in allowed["choices"])
        return "" if named else "one of " + ", ".join(allowed["choices"])
    bounds = [f"{'>' if allowed.get('above') else '>='} {_bound(allowed['low'])}"] if "low" in allowed else []
    bounds += [f"{'<' if allowed.get('below') else '<='} {_bound(allowed['high'])}"] if "high" in allowed else []
    return ", ".join(["whole"] * bool(allowed.get("whole")) + bounds)


def _bound(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"
