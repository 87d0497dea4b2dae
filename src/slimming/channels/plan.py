"""A pruning plan: plain data that say what stays of every layer."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from slimming.channels.inputs import check_spec
from slimming.channels.layers import SelectBatchNorm
from slimming.channels.tape import WITH_FILTERS
from slimming.errors import PlanError

FORMAT = 4  # 1 had no attributes, 1 to 3 had nothing in `zeroed`; 1 and 2 had other words, see RENAMED
RENAMED = {"place": "scatter", "put_back": "restored", "followed": "dead"}  # in `layers` and `got`, since format 3
FIELDS: dict[str, type] = {"fingerprint": str, "network": str, "keep": dict, "layers": dict, "asked": dict, "got": dict}
FIELDS |= {"train_watched": bool, "train_reason": str, "attributes": list, "zeroed": dict}
COUNTED = ("removed", "candidates", "ratio", "restored", "dead", "macs", "params")  # of `got`, as `describe` shows it
KINDS = (*WITH_FILTERS, "norm", "scale")


@dataclass
class LayerPlan:
    """What stays of one layer; indices relative to the network that the plan is for.

    Attributes:
        kind: conv, transposed, linear, depthwise, grouped, norm or scale (a parameter with one number per channel).
        ins: kept inputs (positions within a group for `grouped`); for a norm its kept channels.
        outs: kept outputs; for a norm its kept channels.
        size: (inputs, outputs) before.
        select: for a norm: which of the remaining input channels it reads; None: all.
        scatter: for a norm: which of the remaining output channels it writes; None: all.
        width: for a norm with `scatter`: remaining output channels.
    """

    kind: str
    ins: list[int]
    outs: list[int]
    size: tuple[int, int]
    select: list[int] | None = None
    scatter: list[int] | None = None
    width: int = 0

    def check(self, name: str) -> None:
        """Raise PlanError unless the indices are sorted, distinct and within the layer."""
        if self.kind not in KINDS:
            raise PlanError(f"plan: layer {name} is of an unknown kind {self.kind!r}; allowed: {', '.join(KINDS)}")
        if not (isinstance(self.size, tuple) and len(self.size) == 2 and all(_is_whole(n, 1) for n in self.size)):
            raise PlanError(f"plan: size of layer {name} must be two whole numbers >= 1, got {str(self.size)[:100]}")
        _check_indices(name, "ins", self.ins, self.size[0])
        _check_indices(name, "outs", self.outs, self.size[1])
        for side, indices in (("select", self.select), ("scatter", self.scatter)):
            if indices is not None:
                _check_indices(name, side, indices, 2**31, ordered=False)
                if self.kind != "norm" or len(indices) != len(self.outs):
                    raise PlanError(
                        f"plan: {side} of layer {name} must be of a norm, one index for each of its channels"
                    )
        if not _is_whole(self.width, 1 + max(self.scatter) if self.scatter else 0):
            raise PlanError(f"plan: width of layer {name} must be a whole number beyond scatter, got {self.width!r}")


def _check_indices(name: str, side: str, indices: Any, size: int, ordered: bool = True) -> None:
    whole = isinstance(indices, list) and set(map(type, indices)) <= {int}
    if not whole or not indices or len(indices) > size or min(indices) < 0 or max(indices) >= size:
        raise PlanError(f"plan: {side} of layer {name} must be 1 to {size} whole numbers in [0, {size})")
    if len(set(indices)) < len(indices) or (ordered and sorted(indices) != indices):
        raise PlanError(f"plan: {side} of layer {name} must be sorted and distinct")


@dataclass
class PruningPlan:
    """Everything that `prune` and `mask` need; they run no trace.

    Attributes:
        fingerprint: of the network it is for: its parameters' names and shapes, hashed.
        network: class name and parameter count of that network, for messages.
        spec: shapes and dtypes of the example input.
        keep: kept indices of every BatchNorm that loses some.
        layers: what stays of every layer that changes.
        attributes: [module, attribute, position or None, value] of every size kept in an attribute that changes; a position
            is that in a list or tuple of sizes.
        asked: the criterion, with its values.
        got: removed (chosen gammas that went), candidates, ratio = removed / candidates, restored (chosen, but kept by
            constraints), dead (not chosen, but nothing needed them any more), macs and params (shares that remain),
            highest_score (of what was chosen; None if nothing was).
        compare: what the proof compares: the network's `outputs`. Where the network sorts or selects by score, rounding turns
            into other choices; it then compares the outputs of all `layers` that keep every channel.
        zeroed: output channels of convolutions and linear layers, by layer, that write a tensor without a BatchNorm and whose
            filters and biases are zero in the masked network, as gammas and betas are elsewhere; with ties=aligned.
        train_watched: whether the network also ran in train mode; if not, `train_reason` says why.
    """

    fingerprint: str
    network: str
    spec: Any
    keep: dict[str, list[int]]
    layers: dict[str, LayerPlan]
    asked: dict[str, Any]
    got: dict[str, Any]
    train_watched: bool = True
    train_reason: str = ""
    compare: str = "outputs"
    attributes: list[list[Any]] = field(default_factory=list)
    zeroed: dict[str, list[int]] = field(default_factory=dict)
    format: int = field(default=FORMAT)

    def __post_init__(self) -> None:
        for key, kind in FIELDS.items():
            if not isinstance(getattr(self, key), kind):
                raise PlanError(f"plan: {key} must be a {kind.__name__}, got {str(getattr(self, key))[:100]}")
        if self.compare not in ("outputs", "layers"):
            raise PlanError(f"plan: compare must be outputs or layers, got {self.compare!r}")
        for name, layer in self.layers.items():
            layer.check(name)
        for entry in self.attributes:
            _check_attribute(entry)
        for name, indices in self.keep.items():
            kept = self.layers.get(name)
            if kept is None or kept.kind != "norm" or kept.outs != indices:
                raise PlanError(f"plan: keep of {name} does not match its layer entry")
        for name, channels in self.zeroed.items():
            self._check_zeroed(name, channels)

    def _check_zeroed(self, name: str, channels: list[int]) -> None:
        layer = self.layers.get(name)
        if layer is None or layer.kind not in WITH_FILTERS:
            raise PlanError(f"plan: zeroed names {name}, which is no layer of the plan with filters")
        _check_indices(name, "zeroed", channels, layer.size[1])
        if not set(channels).isdisjoint(layer.outs):
            raise PlanError(f"plan: zeroed of layer {name} names a channel that it keeps")

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, numbers and strings."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "PruningPlan":
        """Rebuild a plan.

        Raises:
            PlanError: a missing or unknown key, another format, indices that cannot be.
        """
        try:
            if data["format"] not in range(1, FORMAT + 1):
                raise PlanError(f"plan: format {data['format']!r} is unknown, this version reads 1 to {FORMAT}")
            if data["format"] < 3:
                data = _in_new_words(data)
            layers = {
                name: LayerPlan(**{**layer, "size": tuple(layer["size"])}) for name, layer in data["layers"].items()
            }
            check_spec(data["spec"])
            if odd := [k for k in COUNTED if not isinstance(data["got"][k], int | float)]:
                raise PlanError(f"plan: {odd[0]} in got must be a number")
            return cls(**{**data, "layers": layers, "format": FORMAT})
        except PlanError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise PlanError(f"plan: not a pruning plan ({type(error).__name__}: {error})") from error

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> "PruningPlan":
        """Raises PlanError: not JSON, or not a plan."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"plan: not JSON ({error})") from error
        if not isinstance(data, dict):
            raise PlanError("plan: not a JSON object")
        return cls.from_dict(data)

    def check_model(self, model: nn.Module) -> None:
        """Raise PlanError unless the plan was made for a network of this architecture."""
        if fingerprint(model) != self.fingerprint:
            raise PlanError(f"the plan is for {self.network}, this network is {describe_network(model)}: trace it anew")

    def describe(self) -> str:
        """Return a table for people: channels of every layer that changes, before -> after."""
        got = self.got
        lines = [f"{self.network}: {got['removed']} of {got['candidates']} gammas removed ({got['ratio']:.1%})"]
        lines[0] += f", asked {self.asked}, restored {got['restored']}, dead {got['dead']}"
        lines.append(f"MACs that remain {got['macs']:.1%}, parameters {got['params']:.1%}")
        lines.append(f"{'layer':40} {'kind':10} {'in':>13} {'out':>13}")
        for name, layer in self.layers.items():
            ins, outs = (f"{s} -> {len(i)}" for s, i in zip(layer.size, (layer.ins, layer.outs), strict=True))
            extra = " select" * (layer.select is not None) + " scatter" * (layer.scatter is not None)
            lines.append(f"{name:40} {layer.kind:10} {ins:>13} {outs:>13}{extra}")
        lines += [f"{module}.{name} becomes {value}" for module, name, _, value in self.attributes]
        lines += [f"{name}: {len(gone)} filters go that no BatchNorm follows" for name, gone in self.zeroed.items()]
        if not self.train_watched:
            lines.append(f"not watched in train mode: {self.train_reason}")
        return "\n".join(lines)


def _in_new_words(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data of a plan of format 1 or 2 with the keys of format 3."""

    def renamed(entries: Mapping[str, Any]) -> dict[str, Any]:
        return {RENAMED.get(key, key): value for key, value in entries.items()}

    layers = {name: renamed(layer) for name, layer in data["layers"].items()}
    return {**data, "layers": layers, "got": renamed(data["got"])}


def _is_whole(value: Any, low: int) -> bool:
    return type(value) is int and low <= value < 2**31


def _check_attribute(entry: Any) -> None:
    good = isinstance(entry, list | tuple) and len(entry) == 4
    if good:
        module, name, position, value = entry
        numbers = [n for n in (position, value) if n is not None]
        good = isinstance(module, str) and isinstance(name, str) and value is not None
        good = good and all(type(n) is int and n >= 0 for n in numbers)
    if not good:
        raise PlanError(f"plan: attributes must be [module, attribute, position or null, size], got {entry!r}")


def fingerprint(model: nn.Module) -> str:
    """Hash the names and shapes of parameters and buffers, and the indices of selecting BatchNorms."""
    parts = []
    for prefix, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                # Plans of formats 1 and 2 know a SelectBatchNorm's `scatter` as `place`: their fingerprints stay valid.
                known_as = "place" if name == "scatter" and isinstance(module, SelectBatchNorm) else name
                indices = tensor.tolist() if known_as in ("select", "place") else ""
                parts.append(f"{prefix}.{known_as} {[*tensor.shape]} {indices}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def describe_network(model: nn.Module) -> str:
    return f"{type(model).__name__} with {sum(p.numel() for p in model.parameters()):,} parameters"
