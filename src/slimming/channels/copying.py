"""Copies of networks with some tensors replaced or shared; copy.deepcopy takes longer than everything else together."""

import copy
import types
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

_CONTAINERS = {"_parameters", "_buffers", "_modules"}
_EMPTY = (dict, OrderedDict, set)
_SHARED = {int, float, str, bool, type(None), type, torch.dtype, types.FunctionType, types.BuiltinFunctionType}


def copy_model(model: nn.Module, replaced: dict[int, Any] | None = None) -> nn.Module:
    """Copy a network deeply, as copy.deepcopy does.

    Args:
        replaced: id -> replacement of parameters and buffers; what is not in it is cloned.
    """
    memo: dict[int, Any] = {} if replaced is None else replaced
    modules = list(model.modules())
    kinds = {type(module) for module in modules}
    if any(hasattr(kind, "__deepcopy__") or issubclass(kind, torch.jit.ScriptModule) for kind in kinds):
        copied: nn.Module = copy.deepcopy(model, memo)  # such a class knows better
        return copied
    copies = [module.__class__.__new__(module.__class__) for module in modules]
    memo.update((id(module), new) for module, new in zip(modules, copies, strict=True))
    for module, new in zip(modules, copies, strict=True):
        new.__dict__.update(_contents(module, memo))
    return copies[0]


def shallow_copy(model: nn.Module) -> nn.Module:
    """Copy a network but for its parameters, which are shared: running the copy changes nothing of the network."""
    return copy_model(model, {id(p): p for p in model.parameters()})


def _known(value: Any, memo: dict[int, Any]) -> Any:
    """Return the copy of a module or leaf tensor; one that several modules hold stays one."""
    if id(value) in memo:
        return memo[id(value)]
    if type(value) not in (torch.Tensor, nn.Parameter) or not value.is_leaf:
        return copy.deepcopy(value, memo)
    new = value.detach().clone()
    memo[id(value)] = nn.Parameter(new, value.requires_grad) if isinstance(value, nn.Parameter) else new
    return memo[id(value)]


def _contents(module: nn.Module, memo: dict[int, Any]) -> dict[str, Any]:
    new: dict[str, Any] = {}
    for key, value in module.__dict__.items():
        kind = type(value)
        if kind in _SHARED or (kind is tuple and all(type(v) in _SHARED for v in value)):
            new[key] = value
        elif kind in _EMPTY and not value:
            new[key] = kind()
        elif key in _CONTAINERS:
            new[key] = {k: None if v is None else _known(v, memo) for k, v in value.items()}
        else:
            new[key] = copy.deepcopy(value, memo)
    return new
