"""What a file claims is checked here before anything is made of it: its record, its tensors, the network it names."""

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slimming.errors import CheckpointError

LEAVES = {str, int, float, bool, type(None)}
DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
DTYPES |= {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
DEEPEST = 50  # levels of a record; ours have 6
LONGEST = 200  # characters of a name: unknown ones are compared with all known
PIXELS = 2**28  # of one image: 1 GiB
ROOM = 2**28  # elements (1 GiB) that a network may have beyond MOST times those of the file that describes it
MOST = 64  # a pruned network's file is smaller than its dense network by about the square of the channels' share
CALLS = 1000  # tensors that a constructor may make beyond 4 for each in the file; at most 2 are seen
GROUPS = ("data", "optimizer", "scheduler", "trainer", "model")  # of a record's config


# --- the record -------------------------------------------------------------------------------------------------------


def check_record(record: dict, path: str | os.PathLike) -> None:
    """Raise CheckpointError unless plain data has the form of a `records.Record`.

    `data`, `config`, `stage`, `metrics` and `parent` may be missing: see `Record.need`.
    """
    for key, kinds in (("config", dict), ("data", dict), ("metrics", dict), ("stage", str), ("parent", str | None)):
        _expect(key not in record or isinstance(record[key], kinds), path, key, record.get(key))
    plans = record.get("plans")
    _expect(isinstance(plans, list) and all(isinstance(p, dict) for p in plans), path, "plans", plans)
    splits = record.get("low_rank", {})
    _expect(isinstance(splits, dict) and all(isinstance(s, dict) for s in splits.values()), path, "low_rank", splits)
    _check_spec(record.get("model"), path)
    if "data" in record:
        _check_statistics(record["data"], path)
    config = record.get("config", {})
    for group in GROUPS:
        _expect(isinstance(config.get(group, {}), dict), path, f"config.{group}", config.get(group))
    for key in ("decay_batchnorm", "channels_last"):
        _expect(isinstance(config.get(key, True), bool), path, f"config.{key}", config.get(key))
    _expect(_whole(config.get("seed", 0), 2**32, low=0), path, "config.seed", config.get("seed"))


def _expect(good: bool, path: str | os.PathLike, key: str, value: Any) -> None:
    if not good:
        raise CheckpointError(f"{path} is malformed: {key} in its 'slimming' record is {str(value)[:100]!r}")


def _check_spec(spec: Any, path: str | os.PathLike) -> None:
    if spec is None:
        return
    good = isinstance(spec, dict) and isinstance(spec.get("arguments"), dict) and _is_name(spec.get("name"))
    _expect(good and _is_name(spec["arguments"].get("name", "")), path, "model", spec)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST


def _check_statistics(data: dict, path: str | os.PathLike) -> None:
    keys = ("num_classes", "in_channels", "image_size")
    for key in keys:
        _expect(_whole(data.get(key), PIXELS), path, f"data.{key}", data.get(key))
    _expect(data["in_channels"] * data["image_size"] ** 2 <= PIXELS, path, "data.image_size", data["image_size"])


def _whole(value: Any, high: int, low: int = 1) -> bool:
    return type(value) is int and low <= value <= high


def check_plain(record: dict, path: str | os.PathLike) -> None:
    """Raise CheckpointError unless a record is nested dicts, lists and tuples of strings and numbers, of sane size."""
    try:
        size = _size(record, {}, 0)
    except ValueError as error:
        raise CheckpointError(f"{path} is malformed: its 'slimming' record {error}") from error
    if size > 10**6 + 4 * os.path.getsize(path):  # lists of the same lists of the same lists ...
        raise CheckpointError(f"{path} is malformed: its 'slimming' record would unfold to {size:.0e} values")


def _size(value: Any, known: dict[int, int], depth: int) -> int:
    """Count the values in nested plain data, what is in two places twice; ValueError for anything else."""
    kind = type(value)
    if kind in LEAVES:
        if kind is int and abs(value) >= 2**63:
            raise ValueError("holds a number of more than 64 bits")
        return 1
    if kind not in (dict, list, tuple):
        raise ValueError(f"holds a {kind.__name__}, which is no plain data")
    if depth > DEEPEST:
        raise ValueError(f"is nested more than {DEEPEST} levels deep")
    if id(value) not in known:
        if kind is dict and not set(map(type, value)) <= {str, int}:
            raise ValueError("has keys that are no strings")
        known[id(value)] = 1 + sum(_size(v, known, depth + 1) for v in (value.values() if kind is dict else value))
    return known[id(value)]


# --- tensors ----------------------------------------------------------------------------------------------------------


def check_tensors(weights: dict, path: str | os.PathLike) -> None:
    """Raise CheckpointError unless all values are ordinary tensors whose every element is in the file."""
    for name, value in weights.items():
        fault = _fault(value) if isinstance(name, str) else "has a name that is no string"
        if fault:
            raise CheckpointError(f"{path} is malformed: the weight {str(name)[:100]!r} {fault}")


def _fault(value: Any) -> str:
    if type(value) not in (Tensor, nn.Parameter):
        return f"is a {type(value).__name__}"
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_nested:
        return "is no dense tensor with its numbers in the file"
    if value.dtype not in DTYPES:
        return f"is of {value.dtype}"
    empty = value.numel() == 0 and max(value.shape) > 0
    if empty or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"of shape {tuple(value.shape)} claims more numbers than the file holds"
    return ""


def stored(weights: dict[str, Tensor]) -> int:
    """Count the numbers that a file holds: those that several tensors share once."""
    held = {w.untyped_storage().data_ptr(): w.untyped_storage().nbytes() // w.element_size() for w in weights.values()}
    return sum(held.values())


# --- networks ---------------------------------------------------------------------------------------------------------


class Draft(TorchFunctionMode):
    """While active, a network's constructor makes no more tensors than the weights of a file can account for.

    Of this thread alone, unlike torch's hooks on registration. Without `real` the tensors that become weights have shapes
    and no numbers; all others (the steps of a schedule, say) are real, since constructors compute with them.

    Raises:
        CheckpointError: in the constructor, before it takes the memory.
    """

    SIZED = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)

    # Where there are no numbers torch does these in Python, in half the time of all.
    DRAWN = (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)

    def __init__(self, weights: dict[str, Tensor], path: str | os.PathLike, real: bool):
        super().__init__()
        self.path, self.real = path, real
        self.calls, self.elements = CALLS + 4 * len(weights), ROOM + MOST * stored(weights)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.DRAWN and not self.real and (tensor := args[0] if args else kwargs["tensor"]).is_meta:
            return tensor
        if func not in self.SIZED:
            return func(*args, **kwargs)
        self._count(1, 0)
        outlined = kwargs.get("device") is None and func(*args, **kwargs | {"device": "meta"})
        if outlined is False:  # the constructor insists on a device
            return func(*args, **kwargs)
        if not self.real:
            return outlined
        self._count(0, outlined.numel())
        return func(*args, **kwargs)

    def _count(self, calls: int, elements: int) -> None:
        self.calls, self.elements = self.calls - calls, self.elements - elements
        if self.calls < 0:
            raise CheckpointError(f"{self.path} describes a network of many more layers than it has weights for")
        if self.elements < 0:
            raise CheckpointError(
                f"{self.path} describes a network that is very much larger than its weights, before any pruning, and is "
                "not built on a file's word: load(path, model=...)"
            )


def check_amount(outline: nn.Module, weights: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Raise CheckpointError if a network would hold many times the numbers of the file, whose tensors then overlap."""
    own = {id(t): t.numel() for t in (*outline.parameters(), *outline.buffers())}
    if sum(own.values()) > ROOM + MOST * stored(weights):
        raise CheckpointError(f"{path} is malformed: its weights overlap each other in the file")
