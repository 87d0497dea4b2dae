"""Watching a forward pass: every operator that runs is handed to its rule.

In inference mode composite operators are not decomposed, so a few dozen ATen calls cover what networks do, whatever Python,
scripted or functional code called them. Layers are recognised by the identity of their weights.
"""

import functools
import sys
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from slimming.channels.cost import macs_of
from slimming.channels.rules import RULES, Call
from slimming.channels.tape import FROZEN, Tape, Unknown
from slimming.errors import GraphError

OFF_IN_TRAINING = ("Dropout", "StochasticDepth", "DropPath")  # random layers: watched and compared switched off


class Watcher(TorchDispatchMode):
    """Follows atoms through a forward pass and writes to a Tape."""

    def __init__(self, tape: Tape, model: nn.Module):
        super().__init__()
        self.tape = tape
        self.log: list[tuple] = []  # every call with where its arguments come from
        self.serial: dict[int, tuple[int, int]] = {}
        self.known: dict[int, tuple[Tensor, Tensor]] = {}  # id -> (tensor, kept alive; its atoms)
        self.storages: dict[int, set[int]] = {}  # storage -> ids of known tensors in it
        self.read: set[int] = set()
        self.owners = _owners(model)
        self.names = {module: name for name, module in model.named_modules()}
        self.module = ""

    def enter(self, module: nn.Module, args: Any) -> None:
        """Remember which module runs, for messages."""
        self.module = self.names.get(module, self.module)

    def learn(self, tensor: Tensor, atoms: Tensor) -> None:
        self.known[id(tensor)] = (tensor, atoms)
        self.serial[id(tensor)] = len(self.log), len(self.known)
        self.storages.setdefault(tensor.untyped_storage()._cdata, set()).add(id(tensor))

    def atoms_of(self, value: Any) -> Tensor | None:
        entry = self.known.get(id(value)) if isinstance(value, Tensor) else None
        return entry[1] if entry else None

    def owner_of(self, tensor: Tensor | None) -> tuple[str, nn.Module] | None:
        return self.owners.get(id(tensor))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        leaves = _flat((*args, *kwargs.values()))
        operands = [t for t in leaves if isinstance(t, Tensor) and id(t) in self.known]
        if operands:
            self.log.append((func, *map(self._sign, leaves)))
            self.read.update(map(id, operands))
            uses = len(self.tape.uses)
            self._follow(Call(func, args, kwargs, out, self.atoms_of, self.owner_of), operands)
            if len(self.tape.uses) == uses:
                self.tape.other_macs += macs_of(func, args, out)
        return out

    def _sign(self, leaf: Any) -> Any:
        """Say where an argument comes from: the number of the tensor that the input led to, the weight, or its value."""
        if not isinstance(leaf, Tensor):
            return leaf
        known, owner = self.serial.get(id(leaf)), self.owners.get(id(leaf))
        return known if known is not None else (owner[0] if owner else None, leaf.shape)

    def _follow(self, call: Call, operands: list[Tensor]) -> None:
        outputs = [t for t in _flat([call.out]) if isinstance(t, Tensor)]
        name = call.func._schema.name.removeprefix("aten::")
        rule = RULES.get(name) or RULES.get(name.removesuffix("_"))
        try:
            if rule is None:
                raise Unknown("no rule for it")
            atoms = rule(self.tape, call)
            atoms = list(atoms) if isinstance(atoms, list | tuple) else [atoms]
            if any(a.ndim != t.ndim for a, t in zip(atoms, outputs, strict=True)):
                raise Unknown("its output has other axes than its rule says")
            changed = call.func._schema.is_mutable and any(
                self.atoms_of(t) is not a for t, a in zip(outputs, atoms, strict=True)
            )
            if changed and any(len(self.storages.get(t.untyped_storage()._cdata, ())) > 1 for t in outputs):
                raise Unknown("it writes in place into a tensor that has views")
        except Unknown as reason:
            where = f" in {self.module}" if self.module else ""
            for tensor in operands:
                self.tape.freeze(self.atoms_of(tensor), f"{name}{where}: {reason}")
            atoms = [torch.full((1,) * t.ndim, FROZEN) for t in outputs]
        for tensor, own in zip(outputs, atoms, strict=True):
            self.learn(tensor, own)


def _flat(values: Iterable) -> list:
    """Return the items of nested lists and tuples."""
    found = []
    for value in values:
        found += _flat(value) if isinstance(value, list | tuple) else [value]
    return found


def _owners(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """Map the id of every parameter and buffer that one module alone owns to (layer name, module)."""
    found: dict[int, list[tuple[str, nn.Module]]] = {}
    for prefix, module in model.named_modules():
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                plain = attribute in ("weight", "bias") or isinstance(module, nn.modules.batchnorm._BatchNorm)
                name = prefix if plain else f"{prefix}.{attribute}".lstrip(".")
                found.setdefault(id(tensor), []).append((name, module))
    return {key: owners[0] for key, owners in found.items() if len(owners) == 1}


def call_model(model: nn.Module, example: Any) -> Any:
    """Call a model on a tensor, a tuple of arguments, or a dict of keyword arguments."""
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, list | tuple) else model(example)


def set_training(model: nn.Module, norms: bool = True) -> nn.Module:
    """Put into train mode all but what is random and, unless `norms`, BatchNorms; in place."""
    model.train()
    for module in model.modules():
        random = any(word in type(module).__name__ for word in OFF_IN_TRAINING)
        if random or (not norms and isinstance(module, nn.modules.batchnorm._BatchNorm)):
            module.eval()
    return model


def mode_matters(model: nn.Module) -> bool:
    """Return whether any code of the network may ask for `training`; if none does, one pass shows all there is.

    Of torch.nn itself only BatchNorm and the random layers ask, and those are switched to one behaviour for either pass.
    """
    return any(
        isinstance(m, torch.jit.ScriptModule) or _asks_for_training(type(m))
        for m in model.modules()
        if not type(m).__module__.startswith("torch.nn.") and not any(w in type(m).__name__ for w in OFF_IN_TRAINING)
    )


@functools.cache
def _asks_for_training(kind: type) -> bool:
    """Search the class, its bases up to torch.nn, and all functions that its Python module defines or imports."""
    places = [c for c in kind.__mro__ if not c.__module__.startswith(("torch.nn.", "builtins", "typing"))]
    found = [f for c in places for f in vars(c).values()]
    for name in {c.__module__ for c in places}:
        found += vars(sys.modules[name]).values() if name in sys.modules else []
    found = [getattr(f, "__func__", getattr(f, "fget", f)) for f in found]
    return any("train" in vars(c) for c in places) or any(
        _mentions(f.__code__) for f in found if hasattr(f, "__code__")
    )


def _mentions(code: types.CodeType) -> bool:
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return "training" in code.co_names or "training" in code.co_consts or any(map(_mentions, inner))


def watch(tape: Tape, copied: nn.Module, example: Any) -> list[tuple]:
    """Run a (light) copy of a network on the example and write down what happens; network outputs are frozen.

    Returns:
        The log of the calls: two passes of equal logs write down the same.

    Raises:
        Exception: whatever the model raises on this input.
    """
    watcher = Watcher(tape, copied)
    hook = nn.modules.module.register_module_forward_pre_hook(watcher.enter)
    try:
        with torch.inference_mode():
            for tensor in tensors_in(example):
                watcher.learn(tensor, torch.full((1,) * tensor.ndim, FROZEN))
            with watcher:
                output = call_model(copied, example)
    finally:
        hook.remove()
    outputs = tensors_in(output)
    given = {id(t) for t in outputs}
    for key, (_, atoms) in watcher.known.items():
        if key in given or key not in watcher.read:  # unread: it may leave the network in some object
            tape.freeze(atoms, "network output")
    return [*watcher.log, ("output", *(watcher.serial.get(id(t)) for t in outputs))]


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


def check_device(model: nn.Module, example: Any) -> None:
    """Raise GraphError where the example and the weights lie on different devices."""
    devices = {p.device for p in model.parameters()}
    wanted = {t.device for t in tensors_in(example)}
    if not wanted:
        raise GraphError("the example input holds no tensor: give a tensor, a tuple of arguments or a dict of them")
    if devices and not wanted <= devices:
        raise GraphError(f"the example input is on {_list(wanted)}, the network on {_list(devices)}: move one of them")


def _list(devices: set) -> str:
    return ", ".join(sorted(map(str, devices)))
