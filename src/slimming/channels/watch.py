"""Watching a forward pass: every operator that runs is handed to its rule.

In inference mode composite operators are not decomposed, so a few dozen ATen calls cover what networks do, whatever Python,
scripted or functional code called them. Layers are recognised by the identity of their weights.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from slimming.channels.atoms import frozen, varying
from slimming.channels.inputs import call_model, tensors_in
from slimming.channels.macs import macs_of
from slimming.channels.owners import Owner, find_owners
from slimming.channels.rules import RULES, Call
from slimming.channels.sizes import SizeMode
from slimming.channels.tape import Tape, UnsupportedOperator

_NESTED = (list, tuple)  # no `list | tuple`, which is made anew in every call
VIEWS = ("aten::view", "aten::reshape", "aten::unsqueeze")


class Watcher(TorchDispatchMode):
    """Follows atoms through a forward pass and writes to a Tape."""

    def __init__(self, tape: Tape, owners: dict[int, Owner], names: dict[nn.Module, str]) -> None:
        super().__init__()
        self.owners, self.names = owners, names
        self.tape, self.tape_start = tape, len(tape.uses)
        self.log: list[tuple[Any, ...]] = []  # every call with where its arguments come from
        self.results: list[Any] = []  # of the calls in the log
        self.serial: dict[int, tuple[int, int]] = {}
        self.known: dict[int, tuple[Tensor, Tensor]] = {}  # id -> (tensor, kept alive; its atoms)
        self.storages: dict[int, set[int]] = {}  # storage -> ids of known tensors in it
        self.read: set[int] = set()
        self.running: list[nn.Module] = []
        self.sizes = SizeMode(self.axis_of)
        self.overwritten: dict[int, Tensor] = {}  # id of a view -> atoms that were written into its storage since
        self.kept: list[Tensor] = []  # views of parameters that the network's code makes

    def enter(self, module: nn.Module, args: Any) -> None:
        self.running.append(module)

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        """Fix a BatchNorm that has just run and was not seen to normalise by its own weights."""
        self.running.pop()
        name = self.names.get(module)
        if name is None or not isinstance(module, nn.modules.batchnorm._BatchNorm):
            return
        reads = any(id(t) in self.known for t in tensors_in(args))
        if reads and all(use.name != name for use in reversed(self.tape.uses[self.tape_start :])):
            mode = "train" if module.training else "eval"
            reason = f"its forward does not call batch_norm on its own weights in {mode} mode"
            self.tape.fixed.setdefault(name, reason)

    def where(self) -> str:
        """Name the innermost module of the network that runs."""
        return next((self.names[m] for m in reversed(self.running) if self.names.get(m)), "")

    def learn(self, tensor: Tensor, atoms: Tensor) -> None:
        self.known[id(tensor)] = (tensor, atoms)
        self.serial[id(tensor)] = len(self.log), len(self.known)
        self.storages.setdefault(tensor.untyped_storage()._cdata, set()).add(id(tensor))

    def atoms_of(self, value: Any) -> Tensor | None:
        entry = self.known.get(id(value)) if isinstance(value, Tensor) else None
        return entry[1] if entry else None

    def axis_of(self, tensor: Tensor, axis: int) -> int:
        """Number an axis whose size is asked for; channels along it are those of its atoms."""
        atoms = self.atoms_of(tensor)
        along = atoms is not None and varying(atoms) == [axis % tensor.ndim]
        self.tape.axes.append(atoms.reshape(-1) if atoms is not None and along else torch.empty(0, dtype=torch.long))
        return len(self.tape.axes) - 1

    def owner_of(self, tensor: Tensor | None) -> tuple[str, nn.Module] | None:
        owner = self.owners.get(id(tensor))
        return owner and (owner.layer, owner.module)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = flat((*args, *kwargs.values()))
        operands = [t for t in leaves if isinstance(t, Tensor) and id(t) in self.known]
        if operands:
            return self.known_call(func, args, kwargs, leaves, operands)
        out = func(*args, **kwargs)
        if func._schema.name in VIEWS and id(args[0]) in self.owners:
            self.owners[id(out)] = self.owners[id(args[0])]
            self.kept.append(out)  # so that no other tensor gets its id
        self.tape.other_macs += macs_of(func, args, kwargs, out) or 0  # None: no rule knows it either
        return out

    def known_call(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any], operands: list[Tensor]
    ) -> Any:
        """Run an operator that gets something which depends on the input, and apply its rule."""
        signed = (func, *map(self.sign, leaves))
        out = func(*args, **kwargs)
        self.log.append(signed)
        self.results.append(out)
        self.read.update(map(id, operands))
        counted = self._counted()
        call = Call(
            func, args, kwargs, out, self.atoms_of, self.owner_of, self._name_of, self.running, self.sizes.given
        )
        self._apply_rule(call, operands)
        if self._counted() == counted:
            self.tape.other_macs += macs_of(func, args, kwargs, out) or 0
        return out

    def _name_of(self, tensor: Tensor) -> str:
        return self.owners[id(tensor)].tensor

    def _counted(self) -> int:
        return len(self.tape.uses) + len(self.tape.products)

    def sign(self, leaf: Any) -> Any:
        """Say where an argument comes from: the number of a tensor that depends on the input, a weight, or a value."""
        if not isinstance(leaf, Tensor):
            return leaf
        known, owner = self.serial.get(id(leaf)), self.owners.get(id(leaf))
        return known if known is not None else (owner and owner.layer, leaf.shape)

    def _apply_rule(self, call: Call, operands: list[Tensor]) -> None:
        """Learn the atoms of an operator's outputs; freeze its operands where no rule proves anything."""
        outputs = [t for t in flat([call.out]) if isinstance(t, Tensor)]
        name = call.func._schema.name.removeprefix("aten::")
        try:
            atoms = self._atoms_by_rule(call, name, operands, outputs)
        except UnsupportedOperator as reason:
            where = f" in {self.where()}" if self.where() else ""
            for tensor in operands:
                self.tape.freeze(self.known[id(tensor)][1], f"{name}{where}: {reason}")
            atoms = [frozen(t.ndim) for t in outputs]
            if call.func._schema.is_mutable:
                self._overwrite(outputs, atoms)
        for tensor, own in zip(outputs, atoms, strict=True):
            self.learn(tensor, own)

    def _atoms_by_rule(self, call: Call, name: str, operands: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
        rule = RULES.get(name) or RULES.get(name.removesuffix("_"))
        if rule is None:
            raise UnsupportedOperator("no rule for it")
        for tensor in operands:
            if id(tensor) in self.overwritten:
                self.tape.freeze(self.overwritten[id(tensor)], f"{name}: another view of its input was overwritten")
                raise UnsupportedOperator("its input was overwritten through a view")
        found = rule(self.tape, call)
        atoms = found if isinstance(found, list) else [found]
        if any(a.ndim != t.ndim for a, t in zip(atoms, outputs, strict=True)):
            raise UnsupportedOperator("its output has other axes than its rule says")
        if call.func._schema.is_mutable and any(self.atoms_of(t) is not a for t, a in zip(outputs, atoms, strict=True)):
            self._overwrite(outputs, atoms)
        return atoms

    def _overwrite(self, outputs: list[Tensor], atoms: list[Tensor]) -> None:
        """Remember that all other views of what is written in place have become stale."""
        for tensor, own in zip(outputs, atoms, strict=True):
            for view in self.storages.get(tensor.untyped_storage()._cdata, set()) - {id(tensor)}:
                self.overwritten[view] = own
            self.overwritten.pop(id(tensor), None)


def watch(tape: Tape, copied: nn.Module, example: Any) -> Watcher:
    """Run a shallow copy of a network on the example and write down what happens; network outputs are frozen.

    Raises:
        Exception: whatever the model raises on this input.
    """
    names = {module: name for name, module in copied.named_modules()}
    watcher = Watcher(tape, find_owners(names), names)
    outputs = tensors_in(run_watched(watcher, copied, example))
    given = {id(t) for t in outputs}
    for key, (_, atoms) in watcher.known.items():
        if key in given or key not in watcher.read:  # unread: it may leave the network in some object
            tape.freeze(atoms, "network output")
    watcher.log.append(("output", *(watcher.serial.get(id(t)) for t in outputs)))
    return watcher


def run_watched(watcher: Watcher, copied: nn.Module, example: Any) -> Any:
    """Return the outputs of a network that a watcher follows."""
    hooks = [
        nn.modules.module.register_module_forward_pre_hook(watcher.enter),
        nn.modules.module.register_module_forward_hook(watcher.leave, always_call=True),
    ]
    try:
        with torch.inference_mode():
            for tensor in tensors_in(example):
                watcher.learn(tensor, frozen(tensor.ndim))
            with watcher.sizes, watcher:
                return call_model(copied, example)
    finally:
        for hook in hooks:
            hook.remove()


def flat(values: Iterable[Any]) -> list[Any]:
    """Return the items of nested lists and tuples."""
    found = []
    for value in values:
        if isinstance(value, _NESTED):
            found += flat(value)
        else:
            found.append(value)
    return found
