"""Parameters, multiply-accumulates and activations of a network, counted from the operators that really run.

macs.py says what counts as a MAC; FLOPs = 2 * MACs.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from slimming.channels.macs import macs_of, tensors, title


@dataclass
class Cost:
    """What a network costs on one example.

    Attributes:
        num_params: elements of all parameters, shared ones once.
        macs: multiply-accumulates of one forward pass on the example, divided by its batch size.
        activation_bytes: bytes per item of all tensors that the operators of that pass write; views and in-place results
            count nothing.
        layers: macs by the name of the layer whose weight is used; "" for products of activations.
        layer_params: parameters that each module holds itself, by its name.
        uncounted: operators that multiply tensors but whose MACs are unknown, with the layer whose weight they use.
    """

    num_params: int
    macs: int
    activation_bytes: int = 0
    layers: dict[str, int] = field(default_factory=dict)
    layer_params: dict[str, int] = field(default_factory=dict)
    uncounted: list[str] = field(default_factory=list)

    @property
    def flops(self) -> int:
        return 2 * self.macs

    def record(self) -> dict[str, Any]:
        """Return the entry for result.json: num_params, macs and, where there are any, uncounted operators."""
        known: dict[str, Any] = {"num_params": self.num_params, "macs": self.macs}
        return known | ({"uncounted": self.uncounted} if self.uncounted else {})


class _Counter(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {_address(p): name.rpartition(".")[0] for name, p in model.named_parameters()}
        self.layers: dict[str, int] = {}
        self.uncounted: dict[str, None] = {}
        self.written: dict[int, torch.UntypedStorage] = {}  # kept alive: no address serves twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for tensor in tensors(out):
            storage = tensor.untyped_storage()
            self.written.setdefault(storage._cdata, storage)
        count = macs_of(func, args, kwargs, out)
        if count != 0:
            addresses = map(_address, tensors((args, kwargs)))
            name = next((self.names[address] for address in addresses if address in self.names), "")
            if count is None:
                self.uncounted[f"{title(func)} in {name}" if name else title(func)] = None
            else:
                self.layers[name] = self.layers.get(name, 0) + count
        return out


def _address(tensor: Tensor) -> tuple[int, int]:
    """Return where a tensor's elements begin; the storage object stands for addresses, which the meta device lacks."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def cost(model: nn.Module, example: torch.Tensor) -> Cost:
    """Count parameters and MACs; the model is not changed.

    Args:
        model: any network, on the device of the example.
        example: (N, ...) an input; MACs are counted per item of its first axis.
    """
    model = copy.deepcopy(model).eval()
    counter = _Counter(model)
    with torch.inference_mode(), counter:
        model(example)
    layers = {name: count // len(example) for name, count in counter.layers.items()}
    given = {t.untyped_storage()._cdata for t in (example, *model.parameters(), *model.buffers())}
    written = sum(s.nbytes() for address, s in counter.written.items() if address not in given)
    held = {n: sum(p.numel() for p in m.parameters(recurse=False)) for n, m in model.named_modules()}
    return Cost(
        num_params=sum(p.numel() for p in model.parameters()),
        macs=sum(layers.values()),
        activation_bytes=written // len(example),
        layers=layers,
        layer_params={name: count for name, count in held.items() if count},
        uncounted=list(counter.uncounted),
    )


def widths(model: nn.Module) -> list[int | str]:
    """List the channels of every BatchNorm and an "M" for every max pooling, as the public codes print a network's `cfg`."""
    found: list[int | str] = []
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            found.append(module.num_features)
        elif isinstance(module, nn.MaxPool2d):
            found.append("M")
    return found


def latency_ms(runs: dict[str, Callable[[], object]], device: torch.device, repeats: int = 15) -> dict[str, float]:
    """Time forward passes in turns, so that all of them get the same share of a busy machine.

    Args:
        runs: functions that run one network each; each is called once more before the clock starts.

    Returns:
        Median wall time of each, in milliseconds.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for turn in range(repeats + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if turn:
                    times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}
