"""Sizes that a network keeps in attributes of its modules and writes into its operators: `torch.split(x, self.width, 1)`.

While a network is watched, every whole number among the attributes of its modules is a Size, and so is every size of a tensor
that its code asks for. A Size is an int that remembers, through arithmetic, what it was made of. Where a Size made of
attributes alone reaches an operator, surgery can resize the operator by giving those attributes new values.
"""

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Attribute = tuple[str, str, int | None]  # module, attribute, position where it holds a list or tuple of numbers
Values = dict[Attribute, int]
SHAPE = "shape of a tensor"  # instead of an attribute's name; the position then counts axes in Tape.axes
RESIZED = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm)  # surgery itself sets their numbers


class Size(int):
    """An int made of attributes.

    Attributes:
        made_of: the attributes that it depends on.
        compute: returns its value, given theirs.
    """

    made_of: frozenset[Attribute] = frozenset()
    compute: Callable[[Values], int]

    @classmethod
    def of(cls, attribute: Attribute, value: int) -> "Size":
        return cls._new(value, frozenset([attribute]), lambda values: values[attribute])

    @classmethod
    def _new(cls, value: int, made_of: frozenset[Attribute], compute: Callable[[Values], int]) -> "Size":
        size = cls(value)
        size.made_of, size.compute = made_of, compute
        return size


def _arithmetic(function: Callable[[int, int], int], swapped: bool) -> Callable[[Size, Any], Any]:
    def apply(own: Size, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        first, second = (other, own) if swapped else (own, other)
        value = function(int(first), int(second))
        made_of = own.made_of | getattr(other, "made_of", frozenset())
        return Size._new(value, made_of, lambda values: function(_value(first, values), _value(second, values)))

    return apply


for _name in ("add", "sub", "mul", "floordiv"):
    setattr(Size, f"__{_name}__", _arithmetic(getattr(operator, _name), swapped=False))
    setattr(Size, f"__r{_name}__", _arithmetic(getattr(operator, _name), swapped=True))


def _value(number: int, values: Values) -> int:
    return number.compute(values) if isinstance(number, Size) and number.made_of else int(number)


@dataclass
class Resize:
    """`size` counts the channels `atoms` (n,) and has to follow when some of them go."""

    size: Size
    atoms: Tensor
    reason: str


class SizeMode(TorchFunctionMode):
    """Keeps the Sizes among the arguments of the torch function that runs, until it returns.

    Args:
        axis_of: numbers an axis of a tensor.
    """

    def __init__(self, axis_of: Callable[[Tensor, int], int]) -> None:
        super().__init__()
        self.axis_of = axis_of
        self.given = Given()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outer, self.given = self.given, _collect((*args, *(kwargs or {}).values()), Given())
        try:
            out = func(*args, **(kwargs or {}))
        finally:
            self.given = outer
        if isinstance(out, torch.Size) and isinstance(args[0], Tensor):
            return torch.Size([self._size_of(args[0], axis, n) for axis, n in enumerate(out)])
        return self._size_of(args[0], args[1], out) if func is torch.Tensor.size and len(args) > 1 else out

    def _size_of(self, tensor: Tensor, axis: int, value: int) -> Size:
        return Size.of(("", SHAPE, self.axis_of(tensor, axis)), value)


def axes_of(size: Size | None) -> list[int]:
    """Return the numbers, in Tape.axes, of the axes that a size was made of."""
    made_of = size.made_of if size is not None else ()
    return [position for _, name, position in made_of if name == SHAPE and position is not None]


def match(numbers: Iterable[int], given: "Given") -> list[Size | None]:
    """Return for each number the given Size that it is, None where it is no Size.

    Numbers that were given as one sequence are told by their position in it, others by their value if as many are given.
    """
    numbers = list(numbers)
    found: list[Size | None] = []
    for sequence in given.sequences:
        if [int(n) for n in sequence] == numbers:
            return [n if isinstance(n, Size) else None for n in sequence]
    for i, number in enumerate(numbers):
        same = [size for size in given.sizes if size == number]
        found.append(same[numbers[:i].count(number)] if len(same) == numbers.count(number) else None)
    return found


@dataclass
class Given:
    """The whole numbers among the arguments of a function: sequences of them, and all that are Sizes, in order."""

    sequences: list[list[int]] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)


def _collect(values: Iterable[Any], given: Given) -> Given:
    """Note the numbers in nested arguments."""
    numbers = [value for value in values if isinstance(value, int) and value is not True and value is not False]
    if len(numbers) > 1:
        given.sequences.append(numbers)
    for value in values:
        kind = type(value)
        if kind is Size:
            given.sizes.append(value)
        elif kind is slice:
            given.sizes += [bound for bound in (value.start, value.stop) if type(bound) is Size]
        elif kind in (list, tuple, torch.Size):
            _collect(value, given)
    return given


def has_sizes(module: nn.Module) -> bool:
    """Return whether a module's attributes may hold sizes of its network's code."""
    return not (type(module).__module__.startswith("torch.nn.") or isinstance(module, RESIZED))


def mark_sizes(model: nn.Module) -> None:
    """Replace the whole numbers among the attributes of all modules by Sizes; in place."""
    for name, module in model.named_modules():
        if not has_sizes(module):
            continue
        for attribute, value in module.__dict__.items():
            if type(value) is int:
                module.__dict__[attribute] = Size.of((name, attribute, None), value)
            elif type(value) in (list, tuple) and value and all(type(v) is int for v in value):
                sizes = (Size.of((name, attribute, i), v) for i, v in enumerate(value))
                module.__dict__[attribute] = type(value)(sizes)


def new_values(counts: Iterable[tuple[Size, int]], model: nn.Module) -> Values:
    """Find the values of attributes with which every Size equals its count; return those that change.

    Of a Size made of several attributes, `self.channels // self.branches`, the largest changes that nothing else decides.

    Raises:
        ValueError: there are none.
    """
    found: Values = {}
    for size, count in sorted(counts, key=lambda pair: len(pair[0].made_of)):
        now = {attribute: read_attribute(model, attribute) for attribute in size.made_of} | found
        free = sorted(size.made_of - found.keys(), key=lambda a: (now[a], a))
        if free and size.compute(now) != count:
            now[free[-1]] = _solve(size, count, free[-1], now)
        if size.compute(now) != count:
            raise ValueError(f"{attribute_name(min(size.made_of))} would need two values")
        found |= {attribute: now[attribute] for attribute in size.made_of}
    return {a: v for a, v in found.items() if v != read_attribute(model, a)}


def _solve(size: Size, count: int, attribute: Attribute, values: Values) -> int:
    highest = values[attribute] * max(1, -(-count // max(1, size.compute(values))))
    for value in range(highest + 1):
        if size.compute(values | {attribute: value}) == count:
            return value
    raise ValueError(f"no value of {attribute_name(attribute)} gives {count}")


def attribute_name(attribute: Attribute) -> str:
    module, name, position = attribute
    return f"{module}.{name}".lstrip(".") + ("" if position is None else f"[{position}]")


def read_attribute(model: nn.Module, attribute: Attribute) -> Any:
    """Return what an attribute holds: a whole number, if it is a size."""
    module, name, position = attribute
    value = getattr(model.get_submodule(module), name)
    return value if position is None else value[position]


def write_attribute(model: nn.Module, attribute: Attribute, value: int) -> None:
    module, name, position = attribute
    owner = model.get_submodule(module)
    if position is None:
        setattr(owner, name, value)
        return
    old = getattr(owner, name)
    setattr(owner, name, type(old)([*old[:position], value, *old[position + 1 :]]))
