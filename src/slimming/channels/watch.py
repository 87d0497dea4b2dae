"""Watching a forward pass: every operator that runs is handed to its rule.

In inference mode composite operators are not decomposed, so a few dozen ATen calls cover what networks do, whatever Python,
scripted or functional code called them. Layers are recognised by the identity of their weights.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from slimming.channels.copying import shallow_copy
from slimming.channels.layers import has_plain_forward
from slimming.channels.macs import macs_of
from slimming.channels.rules import RULES, Call
from slimming.channels.sizes import SizeMode
from slimming.channels.tape import FROZEN, Tape, UnsupportedOperator, varying
from slimming.errors import GraphError

VIEWS = ("aten::view", "aten::reshape", "aten::unsqueeze")
OFF_IN_TRAINING = ("Dropout", "StochasticDepth", "DropPath")  # random layers: watched and compared switched off


class Watcher(TorchDispatchMode):
    """Follows atoms through a forward pass and writes to a Tape."""

    def __init__(self, tape: Tape, owners: dict[int, "Owner"], names: dict[nn.Module, str]):
        super().__init__()
        self.owners, self.names = owners, names
        self.tape, self.tape_start = tape, len(tape.uses)
        self.log: list[tuple] = []  # every call with where its arguments come from
        self.serial: dict[int, tuple[int, int]] = {}
        self.known: dict[int, tuple[Tensor, Tensor]] = {}  # id -> (tensor, kept alive; its atoms)
        self.storages: dict[int, set[int]] = {}  # storage -> ids of known tensors in it
        self.read: set[int] = set()
        self.running: list[nn.Module] = []
        self.sizes = SizeMode(self.axis_of)
        self.overwritten: dict[int, Tensor] = {}  # id of a view -> atoms that were written into its storage since
        self.kept: list[Tensor] = []  # views of parameters that the network's code makes
        self.results: list[Any] = []  # of the calls in the log

    def enter(self, module: nn.Module, args: Any) -> None:
        self.running.append(module)

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        """Fix a BatchNorm that has just run and was not seen to normalise by its own weights."""
        self.running.pop()
        name = self.names.get(module)
        if name is None or not isinstance(module, nn.modules.batchnorm._BatchNorm):
            return
        reads = any(id(t) in self.known for t in tensors_in(args))
        if reads and all(use.name != name for use in self.tape.uses[self.tape_start :]):
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
        self.tape.axes.append(atoms.reshape(-1) if along else torch.empty(0, dtype=torch.long))
        return len(self.tape.axes) - 1

    def owner_of(self, tensor: Tensor | None) -> tuple[str, nn.Module] | None:
        owner = self.owners.get(id(tensor))
        return owner and (owner.layer, owner.module)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = _flat((*args, *kwargs.values()))
        operands = [t for t in leaves if isinstance(t, Tensor) and id(t) in self.known]
        if operands:
            return self._known_call(func, args, kwargs, leaves, operands)
        out = func(*args, **kwargs)
        if func._schema.name in VIEWS and id(args[0]) in self.owners:
            self.owners[id(out)] = self.owners[id(args[0])]
            self.kept.append(out)  # so that no other tensor gets its id
        self.tape.other_macs += macs_of(func, args, kwargs, out) or 0  # None: no rule knows it either
        return out

    def _known_call(self, func, args: tuple, kwargs: dict, leaves: list, operands: list[Tensor]) -> Any:
        signed = (func, *map(self._sign, leaves))
        out = func(*args, **kwargs)
        self.log.append(signed)
        self.results.append(out)
        self.read.update(map(id, operands))
        counted = self._counted()
        call = Call(
            func, args, kwargs, out, self.atoms_of, self.owner_of, self._name_of, self.running, self.sizes.given
        )
        self._follow(call, operands)
        if self._counted() == counted:
            self.tape.other_macs += macs_of(func, args, kwargs, out) or 0
        return out

    def _name_of(self, tensor: Tensor) -> str:
        return self.owners[id(tensor)].tensor

    def _overwrite(self, outputs: list[Tensor], atoms: list[Tensor]) -> None:
        """Remember that all other views of what is written in place have become stale."""
        for tensor, own in zip(outputs, atoms, strict=True):
            for view in self.storages.get(tensor.untyped_storage()._cdata, set()) - {id(tensor)}:
                self.overwritten[view] = own
            self.overwritten.pop(id(tensor), None)

    def _counted(self) -> int:
        return len(self.tape.uses) + len(self.tape.products)

    def _sign(self, leaf: Any) -> Any:
        """Say where an argument comes from: the number of the tensor that the input led to, the weight, or its value."""
        if not isinstance(leaf, Tensor):
            return leaf
        known, owner = self.serial.get(id(leaf)), self.owners.get(id(leaf))
        return known if known is not None else (owner and owner.layer, leaf.shape)

    def _follow(self, call: Call, operands: list[Tensor]) -> None:
        outputs = [t for t in _flat([call.out]) if isinstance(t, Tensor)]
        name = call.func._schema.name.removeprefix("aten::")
        rule = RULES.get(name) or RULES.get(name.removesuffix("_"))
        try:
            if rule is None:
                raise UnsupportedOperator("no rule for it")
            for tensor in operands:
                if id(tensor) in self.overwritten:
                    self.tape.freeze(self.overwritten[id(tensor)], f"{name}: another view of its input was overwritten")
                    raise UnsupportedOperator("its input was overwritten through a view")
            atoms = rule(self.tape, call)
            atoms = list(atoms) if isinstance(atoms, list | tuple) else [atoms]
            if any(a.ndim != t.ndim for a, t in zip(atoms, outputs, strict=True)):
                raise UnsupportedOperator("its output has other axes than its rule says")
            changed = call.func._schema.is_mutable and any(
                self.atoms_of(t) is not a for t, a in zip(outputs, atoms, strict=True)
            )
            if changed:
                self._overwrite(outputs, atoms)
        except UnsupportedOperator as reason:
            where = f" in {self.where()}" if self.where() else ""
            for tensor in operands:
                self.tape.freeze(self.atoms_of(tensor), f"{name}{where}: {reason}")
            atoms = [torch.full((1,) * t.ndim, FROZEN) for t in outputs]
            if call.func._schema.is_mutable:
                self._overwrite(outputs, atoms)
        for tensor, own in zip(outputs, atoms, strict=True):
            self.learn(tensor, own)


def _flat(values: Iterable) -> list:
    """Return the items of nested lists and tuples."""
    found = []
    for value in values:
        found += _flat(value) if isinstance(value, list | tuple) else [value]
    return found


class Owner(NamedTuple):
    """Whose a parameter or buffer is.

    Attributes:
        layer: its name in plans: the module's, or the tensor's own where a module holds it beside weight and bias.
        module: the one that holds it.
        tensor: its name in the network.
    """

    layer: str
    module: nn.Module
    tensor: str


def _owners(names: dict[nn.Module, str]) -> dict[int, Owner]:
    """Map the id of every parameter and buffer that one module alone holds to its owner."""
    found: dict[int, list[Owner]] = {}
    for module, prefix in names.items():
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                plain = attribute in ("weight", "bias") or isinstance(module, nn.modules.batchnorm._BatchNorm)
                own = f"{prefix}.{attribute}".lstrip(".")
                found.setdefault(id(tensor), []).append(Owner(prefix if plain else own, module, own))
    return {key: owners[0] for key, owners in found.items() if len(owners) == 1}


def call_model(model: nn.Module, example: Any) -> Any:
    """Call a model on a tensor, a tuple of arguments, or a dict of keyword arguments."""
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, list | tuple) else model(example)


def set_training(model: nn.Module, norms: bool = True) -> nn.Module:
    """Put into train mode all but what is random and, unless `norms`, BatchNorms that do then what they do in eval mode."""
    model.train()
    alike: dict[tuple, bool] = {}
    for module in model.modules():
        random = any(word in type(module).__name__ for word in OFF_IN_TRAINING)
        if random or (not norms and isinstance(module, nn.modules.batchnorm._BatchNorm) and _is_alike(module, alike)):
            module.eval()
    return model


def _is_alike(norm: nn.modules.batchnorm._BatchNorm, seen: dict[tuple, bool]) -> bool:
    """Return whether a BatchNorm calls the same operators in both modes; asked once for those of one kind and settings."""
    if has_plain_forward(norm):
        return True
    plain = {k: v for k, v in vars(norm).items() if isinstance(v, int | float | str | None) and k != "num_features"}
    key = (type(norm), *map(type, norm.modules()), *sorted(map(repr, plain.items())))
    if key not in seen:
        seen[key] = any(_runs_alike(norm, (2, norm.num_features, *(2,) * dims)) for dims in (2, 1, 0, 3))
    return seen[key]


def _runs_alike(norm: nn.modules.batchnorm._BatchNorm, shape: tuple[int, ...]) -> bool:
    weight = next(iter(norm._parameters.values()))
    example = torch.ones(shape) if weight is None else torch.ones(shape, dtype=weight.dtype, device=weight.device)
    logs = []
    try:
        for training in (False, True):
            log = watch(Tape(), shallow_copy(norm).train(training), example).log
            # batch_norm's statistics and mode may differ, nothing else
            logs.append([call[:4] if call[0] is torch.ops.aten.batch_norm.default else call for call in log])
    except Exception:
        return False
    return logs[0] == logs[1]


class Replay(Watcher):
    """Runs a network a second time without computing: what it does must be what it did before, to the same operands."""

    def __init__(self, first: Watcher):
        super().__init__(Tape(), first.owners, first.names)
        self.first = first

    def _known_call(self, func, args: tuple, kwargs: dict, leaves: list, operands: list[Tensor]) -> Any:
        step = len(self.log)
        self.log.append((func, *map(self._sign, leaves)))
        if step >= len(self.first.results) or self.log[step] != self.first.log[step]:
            raise Differs
        out = self.first.results[step]
        for tensor in (t for t in _flat([out]) if isinstance(t, Tensor)):
            self.learn(tensor, self.first.known[id(tensor)][1])
        return out


class Differs(Exception):
    """A second pass does something else than the first."""


def watch(tape: Tape, copied: nn.Module, example: Any) -> Watcher:
    """Run a (light) copy of a network on the example and write down what happens; network outputs are frozen.

    Raises:
        Exception: whatever the model raises on this input.
    """
    names = {module: name for name, module in copied.named_modules()}
    watcher = Watcher(tape, _owners(names), names)
    output = _run(watcher, copied, example)
    outputs = tensors_in(output)
    given = {id(t) for t in outputs}
    for key, (_, atoms) in watcher.known.items():
        if key in given or key not in watcher.read:  # unread: it may leave the network in some object
            tape.freeze(atoms, "network output")
    watcher.log.append(("output", *(watcher.serial.get(id(t)) for t in outputs)))
    return watcher


def does_the_same(first: Watcher, copied: nn.Module, example: Any) -> bool:
    """Return whether the copy, its modes changed since, would do to the example what it did when it was watched."""
    replay = Replay(first)
    try:
        outputs = tensors_in(_run(replay, copied, example))
    except Exception:  # Differs, unless the network's code wraps it
        return False
    return [*replay.log, ("output", *(replay.serial.get(id(t)) for t in outputs))] == first.log


def _run(watcher: Watcher, copied: nn.Module, example: Any) -> Any:
    hooks = [
        nn.modules.module.register_module_forward_pre_hook(watcher.enter),
        nn.modules.module.register_module_forward_hook(watcher.leave, always_call=True),
    ]
    try:
        with torch.inference_mode():
            for tensor in tensors_in(example):
                watcher.learn(tensor, torch.full((1,) * tensor.ndim, FROZEN))
            with watcher.sizes, watcher:
                return call_model(copied, example)
    finally:
        for hook in hooks:
            hook.remove()


def repeat(example: Any) -> Any:
    """Return an example input with every item of its batch twice."""
    if isinstance(example, Tensor):
        return torch.cat((example, example)) if example.ndim else example
    if isinstance(example, dict):
        return {key: repeat(value) for key, value in example.items()}
    return type(example)(map(repeat, example)) if isinstance(example, list | tuple) else example


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
