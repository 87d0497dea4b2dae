"""Parameters, multiply-accumulates and activations of a network, counted from the operators that really run.

Convention: MACs of convolutions, transposed convolutions and matrix products; BatchNorm, activations, pooling and
additions count nothing. FLOPs = 2 * MACs.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


@dataclass
class Cost:
    """What a network costs on one example.

    Attributes:
        num_params: elements of all parameters, shared ones once.
        macs: multiply-accumulates of one forward pass on the example, divided by its batch size.
        activation_bytes: of all tensors that the operators of that pass write, per item; views and in-place results count
            nothing.
        layers: macs by the name of the layer whose weight is used; "" for products of activations.
        layer_params: parameters that each module holds itself, by its name.
    """

    num_params: int
    macs: int
    activation_bytes: int = 0
    layers: dict[str, int] = field(default_factory=dict)
    layer_params: dict[str, int] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        return 2 * self.macs


class _Counter(TorchDispatchMode):
    def __init__(self, names: dict[int, str]):
        super().__init__()
        self.names = names
        self.layers: dict[str, int] = {}
        self.written: dict[int, torch.UntypedStorage] = {}  # kept alive: no address serves twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.written.setdefault(storage.data_ptr(), storage)
        if count := macs_of(func, args, out):
            operands = [a for a in args if isinstance(a, torch.Tensor)]
            name = next((self.names[a.data_ptr()] for a in operands if a.data_ptr() in self.names), "")
            self.layers[name] = self.layers.get(name, 0) + count
        return out


def macs_of(func, args: tuple, out) -> int:
    """Return the multiply-accumulates of one operator call, 0 for what does not multiply."""
    packet, operands = func._overloadpacket, [a for a in args if isinstance(a, torch.Tensor)]
    if packet in _CONVOLUTIONS:
        data, weight = operands[:2]
        transposed = (packet is aten.convolution and args[6]) or packet in _TRANSPOSED
        positions = math.prod((data if transposed else out).shape[2:]) * data.shape[0]
        return positions * weight.numel()
    if packet is aten.linear:
        return operands[0].numel() * operands[1].shape[0]
    if packet in (aten.mm, aten.bmm, aten.matmul):
        return out.numel() * operands[0].shape[-1]
    if packet in (aten.addmm, aten.baddbmm):
        return out.numel() * operands[1].shape[-1]
    if packet is aten.scaled_dot_product_attention:
        query, _, value = operands[:3]
        keys = operands[1].shape[-2]
        return query.numel() * keys + query[..., 0].numel() * keys * value.shape[-1]
    return 0


_TRANSPOSED = {aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d}
_CONVOLUTIONS = {aten.convolution, aten.conv1d, aten.conv2d, aten.conv3d} | _TRANSPOSED


def cost(model: nn.Module, example: torch.Tensor) -> Cost:
    """Count parameters and MACs; the model is not changed.

    Args:
        model: any network, on the device of the example.
        example: (N, ...) an input; MACs are per item of its first axis.
    """
    model = copy.deepcopy(model).eval()
    names = {p.data_ptr(): n.rpartition(".")[0] for n, p in model.named_parameters()}
    counter = _Counter(names)
    with torch.inference_mode(), counter:
        model(example)
    layers = {name: count // len(example) for name, count in counter.layers.items()}
    given = {t.untyped_storage().data_ptr() for t in (example, *model.parameters(), *model.buffers())}
    written = sum(s.nbytes() for address, s in counter.written.items() if address not in given)
    held = {n: sum(p.numel() for p in m.parameters(recurse=False)) for n, m in model.named_modules()}
    return Cost(
        num_params=sum(p.numel() for p in model.parameters()),
        macs=sum(layers.values()),
        activation_bytes=written // len(example),
        layers=layers,
        layer_params={name: count for name, count in held.items() if count},
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
    """Time forward passes in turns, so that all meet the same machine.

    Args:
        runs: functions that run one network each; called once more before the clock starts.

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
