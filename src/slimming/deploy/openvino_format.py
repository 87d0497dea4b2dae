"""OpenVINO's intermediate representation: model.xml, the graph, and model.bin, the weights."""

from pathlib import Path

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

    model = onnx_format.convert(capture(network), network.output)
    openvino.save_model(openvino.Core().read_model(model.SerializeToString()), path, compress_to_fp16=False)
