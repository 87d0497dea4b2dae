"""Fresh weights for a network that has other widths than it was built with: a pruned one.

Slices of the weights of the wide network would not do: their deviation is that of the wide layers.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from slimming.errors import ConfigError

DRAWS = ("reset_parameters", "_reset_parameters", "init_weights")  # methods that draw a module's parameters


@torch.no_grad()
def redraw_as_built(model: nn.Module, factory: Callable[[], nn.Module]) -> None:
    """Give a network, in place, the weights that its factory draws for layers of the widths that it has now.

    The factory runs again, and every parameter that it registers gets the shape of today before anything draws it: whatever
    the constructors do, they do it to layers of these widths.

    Raises:
        ConfigError: a parameter of another shape that the factory made by hand, with values that are not all the same.
    """
    wide, narrow = _build_at_widths_of(model, factory)
    for name, parameter in model.named_parameters():
        value, before = narrow.get_parameter(name), wide.get_parameter(name)
        if value.shape != parameter.shape or bool(value.isnan().any()):
            first = before.flatten()[0]  # a layer scale begins with one number for all channels
            value = first if bool((before == first).all()) else torch.full_like(first, math.nan)
        parameter.copy_(value)
    _reset_statistics(model)
    _check_drawn(model)


@torch.no_grad()
def redraw_layer_by_layer(model: nn.Module) -> None:
    """Let every module of a network draw its parameters again, in place, those inside it first.

    Raises:
        ConfigError: a parameter that no `reset_parameters` or `init_weights` of a module draws.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.fill_(math.nan)
    for module in reversed(list(model.modules())):
        for draw in (getattr(module, name, None) for name in DRAWS):
            if callable(draw) and not _needs_arguments(draw):
                draw()
    _reset_statistics(model)
    _check_drawn(model)


@dataclass
class _Birth:
    """One registration of a parameter while a network is built: whose, and the sizes of that moment."""

    module: nn.Module
    shape: torch.Size
    numbers: dict[str, int]


def _build_at_widths_of(model: nn.Module, factory: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """Build a network twice: as it comes, without using up random numbers, and with the widths of `model`."""
    births: list[_Birth] = []

    def note(module: nn.Module, attribute: str, parameter: nn.Parameter) -> None:
        births.append(_Birth(module, parameter.shape, _numbers(module)))

    with torch.random.fork_rng(devices=[]), _registering(note):
        wide = factory()
    names = {module: name for name, module in wide.named_modules()}
    later = iter(births)

    def fit(module: nn.Module, attribute: str, parameter: nn.Parameter) -> nn.Parameter | None:
        birth = next(later, None)
        if birth is None or birth.module not in names:  # a layer that the factory replaces by another
            return None
        return _fitted(module, attribute, parameter, birth, model.get_submodule(names[birth.module]))

    with _registering(fit):
        return wide, factory()


@contextlib.contextmanager
def _registering(hook: Callable) -> Iterator[None]:
    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _fitted(
    module: nn.Module, attribute: str, parameter: nn.Parameter, birth: _Birth, today: nn.Module
) -> nn.Parameter | None:
    """Return a parameter of today's shape, NaN until it is drawn; None where it has that shape.

    Sizes that the factory changes after this registration (a stem for other channels) are left to it.
    """
    wide, thin = (m._parameters.get(attribute) for m in (birth.module, today))
    if wide is None or thin is None or wide.ndim != len(birth.shape):
        return None
    in_the_end, now = _numbers(birth.module), _numbers(today)
    for name, number in birth.numbers.items():
        if number == in_the_end.get(name):
            setattr(module, name, now.get(name, number))
    sizes = zip(birth.shape, wide.shape, thin.shape, strict=True)
    shape = torch.Size(small if begun == ended else begun for begun, ended, small in sizes)
    if parameter.shape == shape:
        return None
    return nn.Parameter(torch.full(shape, math.nan, dtype=parameter.dtype), parameter.requires_grad)


def _numbers(module: nn.Module) -> dict[str, int]:
    return {name: value for name, value in vars(module).items() if type(value) is int}


def _needs_arguments(function: Callable) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def _reset_statistics(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()


def _check_drawn(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.isnan().any():
            owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
            raise ConfigError(
                f"init=scratch: nothing draws the parameter {name}: give its {owner} a method reset_parameters() that does, "
                "or fine-tune with init=weights"
            )
