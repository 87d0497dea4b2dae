"""OpenVINO's intermediate representation: model.xml, the graph, and model.bin, the weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from slimming.deploy import onnx_format
from slimming.deploy.capturing import Network, capture

SUFFIXES = (".xml", ".bin")
PACKAGES = ("openvino", "onnx", "onnxscript")
EXTRA = "openvino"


def write(network: Network, path: Path) -> None:
    """Write a network with a free batch size in float32; it goes through ONNX, whose folded BatchNorms it keeps.

    Raises:
        ExportError: as `onnx_format.write`.
    """
    import openvino

    model = onnx_format.convert(capture(network))
    openvino.save_model(openvino.Core().read_model(model.SerializeToString()), path, compress_to_fp16=False)


def load(path: Path, threads: int | None = None) -> Callable[[Any], Any]:
    """Return the function that a file computes, on the CPU, in float32 whatever the CPU is faster at.

    Args:
        threads: None for the engine's choice.
    """
    import openvino

    config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        config["INFERENCE_NUM_THREADS"] = threads
    compiled = openvino.Core().compile_model(path, "CPU", config)
    return lambda images: compiled([images])[0]
