"""Options that are declared once: default value, meaning, and what is allowed. Checks, help and docs are made from that.

Imports nothing of ours but errors, and no torch, so that configurations can be checked before anything heavy is loaded.
"""

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any

from slimming.errors import check_choice, check_number


def option(default: Any, meaning: str, **allowed: Any) -> Any:
    """Declare a field of an options dataclass.

    Args:
        default: its value; a mutable one is copied for every instance.
        meaning: what it does, with its unit, as `--help` and docs/options.md show it.
        allowed: `choices=(...)`, or bounds as `errors.check_number` takes them: low, high, above, below, whole.
    """
    metadata = {"meaning": meaning, "allowed": allowed}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_options(options: Any, prefix: str = "") -> None:
    """Check all values of an options dataclass, and of those inside it, against their declarations.

    Args:
        prefix: of the keys in messages.

    Raises:
        ConfigError: a value that is not allowed; the message names its key.
    """
    for field, value in _fields(options):
        key, allowed = f"{prefix}{field.name}", field.metadata.get("allowed")
        if dataclasses.is_dataclass(value):
            check_options(value, f"{key}.")
        elif not allowed or (value is None and allows_none(field)):
            continue
        elif "choices" in allowed:
            check_choice(key, value, allowed["choices"])
        else:
            for number in value if isinstance(value, list) else [value]:
                check_number(key, number, **allowed)


def allows_none(field: dataclasses.Field) -> bool:
    """Return whether a field's type admits None."""
    is_union = isinstance(field.type, types.UnionType)
    return field.type is Any or (is_union and type(None) in typing.get_args(field.type))


def _fields(options: Any) -> Iterator[tuple[dataclasses.Field, Any]]:
    for field in dataclasses.fields(options):
        yield field, getattr(options, field.name)
