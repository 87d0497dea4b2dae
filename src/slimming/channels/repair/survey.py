"""What runs in a network: its convolutions and linear layers in order, and what reads their outputs."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from slimming.channels.inputs import tensors_in
from slimming.channels.macs import tensors, title
from slimming.channels.owners import Owner, find_owners

WEIGHED = ("conv1d", "conv2d", "conv3d", "linear")


class LayerCalls(TorchDispatchMode):
    """Meets the calls of all operators, those of convolutions and linear layers with a weight of their own by name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.owners = find_owners({module: name for name, module in model.named_modules()})

    def run(self, images: Tensor) -> Any:
        with torch.inference_mode(), torch.autocast(images.device.type, enabled=False), self:
            return self.model(images)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        weighed = title(func) in WEIGHED and (title(func) == "linear" or args[0].ndim == args[1].ndim)
        owner = self.owners.get(id(args[1])) if weighed else None
        return self.layer(owner, func, args, kwargs) if owner else self.other(func, args, kwargs)

    def layer(self, owner: Owner, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def other(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)


class Survey(LayerCalls):
    """Finds out which layers run, how often, what reads their outputs, and how large the tensors are.

    Attributes:
        calls: how often every layer runs, in the order in which they first run.
        largest: bytes per image of the tensors that one operator reads and writes, without weights.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.calls: Counter[str] = Counter()
        self.norm_calls: Counter[str] = Counter()
        self.biased: set[str] = set()
        self.outputs: dict[int, tuple[Tensor, str]] = {}  # kept alive, so that no id serves twice
        self.readers: dict[str, list[str]] = {}  # by layer: the name of a BatchNorm, "" for anything else
        self.largest = 0

    def run(self, images: Tensor) -> Any:
        out = super().run(images)
        self.largest //= len(images)
        for tensor in tensors_in(out):
            self._read(tensor, "")
        return out

    def layer(self, owner: Owner, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = self.other(func, args, kwargs)
        self.calls[owner.layer] += 1
        self.outputs[id(out)] = out, owner.layer
        bias = self.owners.get(id(args[2])) if len(args) > 2 and args[2] is not None else None
        if bias and bias.module is owner.module:
            self.biased.add(owner.layer)
        return out

    def other(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        operands = tensors((args, kwargs))
        norm = self._tracking_norm(func, args)
        self.norm_calls[norm] += 1
        for tensor in operands:
            self._read(tensor, norm)
        moved = {id(t): t.nbytes for t in (*operands, *tensors([out])) if id(t) not in self.owners}
        self.largest = max(self.largest, sum(moved.values()))
        return out

    def _read(self, tensor: Tensor, by: str) -> None:
        if id(tensor) in self.outputs:
            self.readers.setdefault(self.outputs[id(tensor)][1], []).append(by)

    def _tracking_norm(self, func: Any, args: tuple[Any, ...]) -> str:
        """Name the BatchNorm that an operator normalises by the running statistics of; "" if it does not."""
        owner = self.owners.get(id(args[3])) if title(func) == "batch_norm" and not args[5] else None
        return owner.layer if owner and isinstance(owner.module, _BatchNorm) else ""

    def norm_behind(self, layer: str) -> str:
        """Name the BatchNorm that reads this layer's outputs, alone, and nothing else; "" if there is none."""
        readers = self.readers.get(layer, [])
        if len(set(readers)) != 1 or not readers[0]:
            return ""
        return readers[0] if self.norm_calls[readers[0]] == len(readers) == self.calls[layer] else ""
