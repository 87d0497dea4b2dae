"""Example inputs: what they hold, how a plan describes them, and how a network is called on them.

An example is a tensor, a tuple of arguments or a dict of keyword arguments, nested as the network wants it.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimming.errors import GraphError, PlanError

LARGEST = 2**30  # numbers of one example input


def call_model(model: nn.Module, example: Any) -> Any:
    """Call a model on a tensor, a tuple of arguments, or a dict of keyword arguments."""
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, list | tuple) else model(example)


def tensors_in(value: Any, depth: int = 0) -> list[Tensor]:
    """Return all tensors in nested containers, data classes and plain objects."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type) and depth < 4:
        value = [*vars(value).values(), *(value if isinstance(value, list | tuple) else ())]
    if isinstance(value, list | tuple | set):
        return [t for item in value for t in tensors_in(item, depth + 1)]
    return []


def map_floats(function: Callable[[Tensor], Tensor], example: Any) -> Any:
    """Return an example input like the one given, with the function's result in the place of every tensor of floats."""
    if isinstance(example, Tensor):
        return function(example) if example.is_floating_point() else example
    if isinstance(example, dict):
        return {key: map_floats(function, value) for key, value in example.items()}
    return type(example)(map_floats(function, v) for v in example) if isinstance(example, list | tuple) else example


def repeat(example: Any) -> Any:
    """Return an example input with every item of its batch twice."""
    if isinstance(example, Tensor):
        return torch.cat((example, example)) if example.ndim else example
    if isinstance(example, dict):
        return {key: repeat(value) for key, value in example.items()}
    return type(example)(map(repeat, example)) if isinstance(example, list | tuple) else example


def check_device(model: nn.Module, example: Any) -> None:
    """Raise GraphError where the example and the weights lie on different devices."""
    devices = {p.device for p in model.parameters()}
    wanted = {t.device for t in tensors_in(example)}
    if not wanted:
        raise GraphError("the example input holds no tensor: give a tensor, a tuple of arguments or a dict of them")
    if devices and not wanted <= devices:
        raise GraphError(f"the example input is on {_list(wanted)}, the network on {_list(devices)}: move one of them")


def _list(devices: set[torch.device]) -> str:
    return ", ".join(sorted(map(str, devices)))


def input_spec(example: Any) -> Any:
    """Describe an example input as plain data: shapes and dtypes in its tuples, lists and dicts."""
    if isinstance(example, Tensor):
        return {"shape": list(example.shape), "dtype": str(example.dtype).removeprefix("torch.")}
    if isinstance(example, dict):
        return {"dict": {k: input_spec(v) for k, v in example.items()}}
    if isinstance(example, list | tuple):
        return {type(example).__name__: [input_spec(v) for v in example]}
    return {"value": example if isinstance(example, int | float | str | bool | None) else repr(example)}


def check_spec(spec: Any, depth: int = 0) -> None:
    """Raise PlanError unless `draw_input` can draw an input of a spec."""
    if depth > 20:
        raise PlanError("plan: spec is nested too deep")
    if "shape" in spec:
        shape = spec["shape"]
        good = isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**31 for n in shape)
        if not good or math.prod(shape) > LARGEST or not isinstance(_dtype(spec["dtype"]), torch.dtype):
            raise PlanError(f"plan: spec has an input that cannot be: {str(spec)[:100]}")
        return
    parts = [*spec["dict"].values()] if "dict" in spec else spec.get("list", spec.get("tuple"))
    for part in parts or ():
        check_spec(part, depth + 1)
    if parts is None and "value" not in spec:
        raise PlanError(f"plan: spec is of no known kind: {str(spec)[:100]}")


def _dtype(name: str) -> Any:
    return getattr(torch, name, None)


def draw_input(spec: Any, generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Any:
    """Draw a random input of a spec: normal floats in `dtype`, small whole numbers."""
    if "shape" in spec:
        kind, shape = _dtype(spec["dtype"]), spec["shape"]
        if kind.is_floating_point:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        return torch.randint(2, shape, generator=generator).to(device, kind)
    if "dict" in spec:
        return {k: draw_input(v, generator, device, dtype) for k, v in spec["dict"].items()}
    for name, container in (("list", list), ("tuple", tuple)):
        if name in spec:
            return container(draw_input(v, generator, device, dtype) for v in spec[name])
    return spec["value"]
