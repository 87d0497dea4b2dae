"""How long every layer of a network takes in an engine over its widths: each layer timed by itself, as a tiny network.

The tiny network is the layer with the BatchNorm and the ReLU that the engine does not fold away. Layers of one kind and size
are timed once. Within the whole network a layer costs something else, as its neighbours share layouts and caches: the table
says which layers are dear and where narrower is faster, and whole networks are timed by themselves.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from slimming.channels.graph import ChannelGraph
from slimming.channels.knapsack import BLOCK, LayerTimes
from slimming.channels.tape import Use
from slimming.deploy.engines import open_engine

FOLDS = ("onnxruntime", "openvino")  # engines that fold a BatchNorm into the layer before it
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}  # by the axes of their input
PARTS = (1 / 8, 1 / 4, 1 / 2)  # of a layer's width that are timed beside the whole
ROUNDS, PASSES, SECONDS = 2, 3, 0.01  # over all layers; at least so many passes, and so long, of one width in a round
PATIENCE_S = 150.0  # a second round begins only before that
OPSET, IR_VERSION = 18, 8  # of the tiny networks; every onnxruntime since 1.14 reads them


@dataclass(frozen=True)
class Layer:
    """A layer as it is timed.

    Attributes:
        kind: conv, depthwise, grouped, linear or norm.
        sizes: kernel, stride, padding and dilation of a convolution.
        groups: of a grouped convolution.
        image: of its input, (N, C, ...) for one image of the network.
        outs: channels of its output.
    """

    kind: str
    sizes: tuple[Any, ...]
    groups: int
    image: tuple[int, ...]
    outs: int

    def axes(self) -> tuple[list[int], list[int]]:
        """Return the widths to time: of inputs and outputs; of layers that have one width a single input."""
        ins = self.image[-1] if self.kind == "linear" else self.image[1]
        own = [ins] if self.kind in ("depthwise", "norm") else _axis(ins, self.groups)
        return own, _axis(self.outs, self.groups if self.kind == "grouped" else 1)

    def network(self, ins: int, outs: int, normed: bool) -> nn.Sequential:
        """Return the tiny network of so many channels; `normed`: with a BatchNorm, where it is a convolution."""
        axes = len(self.image)
        if self.kind == "norm":
            return nn.Sequential(NORMS[axes](outs), nn.ReLU())
        if self.kind == "linear":
            return nn.Sequential(nn.Linear(ins, outs))
        kernel, stride, padding, dilation = self.sizes
        groups = outs if self.kind == "depthwise" else self.groups
        layer = CONVOLUTIONS[axes - 3](
            groups if self.kind == "depthwise" else ins, outs, kernel, stride, padding, dilation, groups
        )
        return nn.Sequential(layer, *[NORMS[axes](outs)] * normed, nn.ReLU())

    def images(self, batch: int, ins: int, outs: int) -> np.ndarray:
        """Return an input for that network: of `batch` images of the whole one."""
        width = outs if self.kind in ("depthwise", "norm") else ins
        shape = [batch * self.image[0], *self.image[1:]]
        shape[-1 if self.kind == "linear" else 1] = width
        return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def _axis(width: int, groups: int = 1) -> list[int]:
    """Return widths to time, ascending: multiples of BLOCK (of the groups, where there are any) and the whole."""
    unit = groups if groups > 1 else BLOCK if width > BLOCK else max(1, BLOCK // 2)
    return sorted({width, *(min(width, max(unit, round(width * part / unit) * unit)) for part in PARTS)})


def layers_of(graph: ChannelGraph, image: tuple[int, ...], engine: str) -> dict[str, Layer]:
    """Return the layers of a network that can be timed, by name.

    Args:
        image: (C, H, W) of the network's input.
    """
    shapes = _input_shapes(graph, image)
    found = {}
    uses = [step.use for step in graph.steps[: graph.recording.evaluated[0]]]
    readers = torch.cat([_seen(use).unique() for use in uses]).bincount(minlength=graph.tape.count)
    written: set[tuple[int, ...]] = set()  # by layers that a BatchNorm can be folded into
    for use in uses:
        module = graph.modules.get(use.name)
        alone = bool((readers[_seen(use)] == 1).all())
        folded = engine in FOLDS and alone and tuple(_seen(use).tolist()) in written
        if use.kind != "norm":
            written.add(tuple(use.write.tolist()))
        if use.name not in shapes or (use.kind == "norm" and folded) or use.name in found:
            continue
        if layer := _layer(use, module, shapes[use.name], len(use.write)):
            found[use.name] = layer
    return found


def _seen(use: Use) -> torch.Tensor:
    """Return the atoms of the whole tensor that a layer reads."""
    return use.read if use.source is None else use.source


def _layer(use: Use, module: Any, image: tuple[int, ...], outs: int) -> Layer | None:
    if use.kind == "norm" and len(image) in NORMS:
        return Layer("norm", (), 1, image, module.num_features)
    if use.kind == "linear" and isinstance(module, nn.Linear):
        return Layer("linear", (), 1, image, outs)
    if use.kind in ("conv", "depthwise", "grouped") and isinstance(module, CONVOLUTIONS) and len(image) in (3, 4, 5):
        same = module.padding if isinstance(module.padding, str) else tuple(module.padding)
        sizes = (tuple(module.kernel_size), tuple(module.stride), same, tuple(module.dilation))
        single = use.kind == "depthwise" and module.in_channels == module.out_channels
        if use.kind == "depthwise" and not single:
            return None
        return Layer(use.kind, sizes, 1 if single else module.groups, image, outs)
    return None


def _input_shapes(graph: ChannelGraph, image: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Run the network once on one image; return the shapes of what its layers read, by name."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and isinstance(inputs[0], torch.Tensor):
                shapes.setdefault(name, tuple(inputs[0].shape))

        return hook

    hooks = [graph.modules[n].register_forward_pre_hook(note(n)) for n in graph.layers if n in graph.modules]
    was_training = graph.model.training
    try:
        with torch.no_grad():
            dtype = next((p.dtype for p in graph.model.parameters()), torch.float32)
            graph.model.eval()(torch.zeros(1, *image, dtype=dtype))
    finally:
        graph.model.train(was_training)
        for hook in hooks:
            hook.remove()
    return shapes


def time_layers(
    layers: dict[str, Layer], engine: str, batch: int, threads: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, LayerTimes]:
    """Time all layers over their widths; see LayerTimes.

    Args:
        batch: images of the whole network in a pass.
        clock: in seconds.
    """
    points = {layer: list(_points(layer)) for layer in dict.fromkeys(layers.values())}
    least: dict[tuple[Layer, int, int], float] = {}
    began = clock()
    for number in range(ROUNDS):  # what was slow because the machine was busy is not slow again
        if number and clock() - began > PATIENCE_S:
            break
        for layer, widths in points.items():
            for ins, outs in widths:
                key, found = (layer, ins, outs), _milliseconds(layer, ins, outs, engine, batch, threads, clock)
                least[key] = min(found, least.get(key, found))
    tables = {layer: _table(layer, {(i, o): least[layer, i, o] for i, o in widths}) for layer, widths in points.items()}
    return {name: tables[layer] for name, layer in layers.items()}


def _points(layer: Layer) -> Iterator[tuple[int, int]]:
    """Yield the widths to time: a grid, and one that is no multiple of BLOCK on each side."""
    ins, outs = layer.axes()
    yield from ((i, o) for i in ins for o in outs)
    for odd, point in ((_odd(ins, layer), lambda o: (o, outs[-1])), (_odd(outs, layer), lambda o: (ins[-1], o))):
        if odd:
            yield point(odd)


def _odd(axis: list[int], layer: Layer) -> int | None:
    """Return a width of 8 more than a multiple of 16, about in the middle of the axis; None where that says nothing."""
    if len(axis) == 1 or axis[-1] < 2 * BLOCK or layer.groups > 1:
        return None
    return axis[-1] // 2 // BLOCK * BLOCK + BLOCK // 2


def _table(layer: Layer, ms: dict[tuple[int, int], float]) -> LayerTimes:
    """Make the table; a narrower layer takes no longer than a wider one, so that noise is cut off."""
    ins, outs = layer.axes()
    rows = [[ms[i, o] for o in outs] for i in ins]
    for a in reversed(range(len(ins))):
        for b in reversed(range(len(outs))):
            wider = [rows[i][o] for i, o in ((a + 1, b), (a, b + 1)) if i < len(ins) and o < len(outs)]
            rows[a][b] = min([rows[a][b], *wider])
    even = LayerTimes(ins, outs, rows)
    odd_in, odd_out = _odd(ins, layer), _odd(outs, layer)
    factors = (
        max(1.0, ms[odd_in, outs[-1]] / even(odd_in, outs[-1])) if odd_in else 1.0,
        max(1.0, ms[ins[-1], odd_out] / even(ins[-1], odd_out)) if odd_out else 1.0,
    )
    return LayerTimes(ins, outs, rows, factors)


def _milliseconds(
    layer: Layer, ins: int, outs: int, engine: str, batch: int, threads: int, clock: Callable[[], float]
) -> float:
    """Return the shortest of several passes; a machine that is busy with something else makes them longer, never shorter."""
    images = layer.images(batch, ins, outs)
    model = layer.network(ins, outs, engine not in FOLDS).eval()
    run = open_engine(model if engine == "torch" else _onnx(model, images.shape), engine, threads)
    run(images)
    times: list[float] = []
    while len(times) < PASSES or sum(times) < SECONDS:
        start = clock()
        run(images)
        times.append(clock() - start)
    return 1000 * min(times)


def _onnx(model: nn.Sequential, shape: tuple[int, ...]) -> bytes:
    """Write a tiny network as ONNX; torch's exporter would take a second for each."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, weights = [], []
    for number, module in enumerate(model):
        entry, kind, tensors, attributes = f"x{number}", *_operator(module)
        names = [f"w{number}.{n}" for n in range(len(tensors))]
        weights += [numpy_helper.from_array(t.detach().numpy(), n) for t, n in zip(tensors, names, strict=True)]
        nodes.append(helper.make_node(kind, [entry, *names], [f"x{number + 1}"], **attributes))
    first = helper.make_tensor_value_info("x0", TensorProto.FLOAT, shape)
    last = helper.make_tensor_value_info(f"x{len(model)}", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "layer", [first], [last], weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    return made.SerializeToString()


def _operator(module: Any) -> tuple[str, list[torch.Tensor], dict[str, Any]]:
    """Return the ONNX operator of a layer, its weights and its attributes."""
    if isinstance(module, nn.ReLU):
        return "Relu", [], {}
    if isinstance(module, nn.Linear):
        return "MatMul", [module.weight.t().contiguous()], {}  # of inputs with any number of axes
    if isinstance(module, CONVOLUTIONS):
        spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        given = [0] * len(spans) if module.padding == "valid" else [span // 2 for span in spans]
        pads = given if isinstance(module.padding, str) else [*module.padding]
        ends = [s - p for s, p in zip(spans, pads, strict=True)] if module.padding == "same" else pads
        attributes = {"strides": module.stride, "dilations": module.dilation, "group": module.groups}
        return "Conv", [module.weight, module.bias], attributes | {"pads": [*pads, *ends]}
    return "BatchNormalization", [module.weight, module.bias, module.running_mean, module.running_var], {}
