"""Copies of networks with some tensors replaced or shared; copy.deepcopy takes longer than everything else together."""

import copy
import types

import torch
from torch import nn

_CONTAINERS = ("_parameters", "_buffers", "_modules")
_SHARED = {int, float, str, bool, type(None), type, torch.dtype, types.FunctionType, types.BuiltinFunctionType}


def copy_model(model: nn.Module, memo: dict[int, object] | None = None) -> nn.Module:
    """Copy a network deeply, as copy.deepcopy does.

    Args:
        memo: id -> replacement of parameters and buffers; what is not in it is cloned.
    """
    memo = {} if memo is None else memo
    modules = list(model.modules())
    if any(hasattr(type(m), "__deepcopy__") or isinstance(m, torch.jit.ScriptModule) for m in modules):
        return copy.deepcopy(model, memo)  # it knows better
    for module in modules:
        memo[id(module)] = module.__class__.__new__(module.__class__)
    for module in modules:
        memo[id(module)].__dict__.update(_contents(module, memo))
    return memo[id(model)]


def shallow_copy(model: nn.Module) -> nn.Module:
    """Copy a network but for its parameters, which are shared: running the copy changes nothing of the network."""
    return copy_model(model, {id(p): p for p in model.parameters()})


def _known(value: object, memo: dict[int, object]) -> object:
    """Return the copy of a module or leaf tensor; one that several modules hold stays one."""
    if id(value) in memo:
        return memo[id(value)]
    tensor = value
    if type(tensor) not in (torch.Tensor, nn.Parameter) or not tensor.is_leaf:
        return copy.deepcopy(tensor, memo)
    new = tensor.detach().clone()
    memo[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    return memo[id(tensor)]


def _contents(module: nn.Module, memo: dict[int, object]) -> dict:
    new = {}
    for key, value in module.__dict__.items():
        if key in _CONTAINERS:
            new[key] = {k: None if v is None else _known(v, memo) for k, v in value.items()}
        elif type(value) in _SHARED:
            new[key] = value
        elif isinstance(value, dict | set) and not value:
            new[key] = value.copy()
        elif isinstance(value, tuple) and all(type(v) in _SHARED for v in value):
            new[key] = value
        else:
            new[key] = copy.deepcopy(value, memo)
    return new
