"""Quantisation of .onnx files by onnxruntime's static quantiser: QuantizeLinear / DequantizeLinear pairs, S8S8, per channel.

The QDQ format, as QOperator with signed activations is slow on x86-64.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimming.deploy.onnx_format import clear
from slimming.quiet import only_errors

ARITHMETIC = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Mul", "Concat")  # what may go back to float
# These take the scale of their input, so that int8 runs through from layer to layer.
CARRYING = (
    "Relu",
    "Clip",
    "LeakyRelu",
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "Gather",
    "Pad",
    "Slice",
    "Split",
)
CARRYING += ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Resize")
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class OnnxQuantiser:
    """See `quantising.Quantiser`.

    A BatchNormalization that could not be folded into a convolution, as in pre-activation networks and DenseNets, stays float,
    and so does what it reads: a sum or a concatenation whose channels have scales of their own, until it has normalised them.
    One int8 scale for all of them is what makes plain quantisation wrong there.
    """

    engine = "onnxruntime"

    def __init__(
        self, source: Path, folder: Path, calibration: Sequence[np.ndarray], reduce_range: bool, symmetric: bool
    ):
        """Prepare the model; `folder` is for files in between, among them the ranges, seen once."""
        import onnx
        from onnxruntime.quantization.shape_inference import quant_pre_process

        self.prepared, self.ranges = folder / "prepared.onnx", folder / "ranges.json"
        self.calibration, self.reduce_range, self.symmetric = calibration, reduce_range, symmetric
        with only_errors(""):  # its advice is to do what was done
            quant_pre_process(_named(onnx.load(source)), str(self.prepared))
        graph = onnx.load(self.prepared).graph
        self.input = graph.input[0].name
        self.streams = _read_by_norms(graph)
        self.nodes = {_layer(node): node.name for node in graph.node if self._is_layer(node)}
        self.layers = list(self.nodes)
        self.scheme = f"static QDQ, S8S8 per channel{', symmetric' * symmetric}, by onnxruntime"

    def _is_layer(self, node: Any) -> bool:
        return node.op_type in ARITHMETIC and node.name not in self.streams

    def write(self, path: Path, floats: Collection[str]) -> None:
        import onnx
        from onnxruntime import quantization

        with only_errors(""):  # its advice is to do what was done
            quantization.quantize_static(
                str(self.prepared),
                str(path),
                _reader(self.input, self.calibration),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=[*ARITHMETIC, *CARRYING],
                per_channel=True,
                reduce_range=self.reduce_range,
                activation_type=quantization.QuantType.QInt8,
                weight_type=quantization.QuantType.QInt8,
                nodes_to_exclude=sorted({*self.streams, *(self.nodes[name] for name in floats)}),
                calibrate_method=quantization.CalibrationMethod.MinMax,
                calibration_cache_path=self.ranges,
                extra_options={"ActivationSymmetric": self.symmetric, "MatMulConstBOnly": True},
            )
        model = onnx.load(path)
        clear(model)
        onnx.checker.check_model(model)
        path.write_bytes(model.SerializeToString(deterministic=True))


def _reader(name: str, calibration: Sequence[np.ndarray]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {name: batch}

    return Reader()


def _named(model: Any) -> Any:
    """Give every node without a name one: the quantiser tells nodes by their names."""
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    return model


def _layer(node: Any) -> str:
    """Name a node as the network does, by its weight (`features.0` of `features.0.weight`), or as it is named itself."""
    if node.op_type in WEIGHTED and node.input[1].endswith(".weight"):
        return node.input[1].removesuffix(".weight")
    return node.name


def _read_by_norms(graph: Any) -> set[str]:
    """Return the names of all BatchNormalizations and of what feeds them, upwards to the nearest layers with weights."""
    writer = {output: node for node in graph.node for output in node.output}
    found: set[str] = set()
    waiting = [node for node in graph.node if node.op_type == "BatchNormalization"]
    while waiting:
        node = waiting.pop()
        found.add(node.name)
        above = [writer[name] for name in node.input if name in writer]
        waiting += [n for n in above if n.op_type not in WEIGHTED and n.name not in found]
    return found
