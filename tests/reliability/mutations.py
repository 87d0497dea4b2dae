"""Seeded ways to damage a file: its bytes, or the values that it holds."""

import copy
import random
from collections.abc import Iterator
from typing import Any

ODD = (
    None,
    True,
    -1,
    0,
    2**62,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "../../../etc/passwd",
    "\0",
    [],
    {},
    [[]],
    "${oc.env:HOME}",
)
ODD += (
    [[]],
    "${oc.env:HOME}",
    {"_target_": "os.system", "command": "touch owned"},
    {"_target_": "builtins.eval"},
    10**400,
    "torchvision",
    "DEFAULT",
)


def damaged_bytes(data: bytes, pick: random.Random) -> bytes:
    """Cut, flip, repeat, remove or overwrite some bytes."""
    place, more = pick.randrange(len(data) + 1), pick.randrange(1, 64)
    kind = pick.choice(("cut", "flip", "repeat", "remove", "zero", "noise", "empty"))
    if kind == "flip":
        new = bytearray(data)
        for _ in range(pick.randrange(1, 8)):
            new[pick.randrange(len(new))] ^= 1 << pick.randrange(8)
        return bytes(new)
    return {
        "cut": data[:place],
        "repeat": data[:place] + data[max(0, place - more) :],
        "remove": data[:place] + data[place + more :],
        "zero": data[:place] + bytes(more) + data[place + more :],
        "noise": data[:place] + pick.randbytes(more) + data[place + more :],
        "empty": b"",
    }[kind]


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every value inside dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def damaged_values(value: Any, pick: random.Random, odd: tuple = ODD) -> Any:
    """Replace, remove, double or rename one to three values at any depth of dicts and lists."""
    value = _lists(copy.deepcopy(value))
    for _ in range(pick.choice((1, 1, 1, 2, 3))):
        path = pick.choice(list(places(value)) or [()])
        if not path:
            continue
        owner, key = value, path[-1]
        for step in path[:-1]:
            owner = owner[step]
        _strike(owner, key, pick, odd)
    return value


def _strike(owner: Any, key: Any, pick: random.Random, odd: tuple) -> None:
    kind = pick.choice(("replace", "replace", "replace", "remove", "add", "scale"))
    if kind == "remove":
        del owner[key]
    elif kind == "add" and isinstance(owner, dict):
        owner[pick.choice(("_target_", "__class__", "..", "x" * 300, ""))] = pick.choice(odd)
    elif kind == "add":
        owner.insert(key, pick.choice(odd))
    elif kind == "scale" and type(owner[key]) in (int, float):
        owner[key] = owner[key] * pick.choice((-1, 2, 1000, 2**40))
    else:
        owner[key] = pick.choice(odd)


def _lists(value: Any) -> Any:
    """Turn tuples into lists, so that all can be changed in place."""
    if isinstance(value, dict):
        return {k: _lists(v) for k, v in value.items()}
    return [_lists(v) for v in value] if isinstance(value, list | tuple) else value
