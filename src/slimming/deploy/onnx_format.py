"""ONNX: for onnxruntime, TensorRT, OpenVINO and most other engines."""

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from slimming.deploy.capturing import BATCH, INPUT, Network, capture, first_lines, layer_of
from slimming.errors import ExportError
from slimming.quiet import only_errors

SUFFIXES = (".onnx",)
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
EXTRA = "export"
OPSET = 18  # the exporter's own, which needs no conversion; TensorRT 8.6 and onnxruntime 1.14 read it already
LARGEST = 2**31 - 2**24  # bytes of weights: a protobuf message ends at 2 GiB
UNKNOWN = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)', overload='(\w+)'\)>")


def write(network: Network, path: Path) -> None:
    """Write a network with a free batch size, every BatchNorm that directly follows a convolution folded into it.

    Raises:
        ExportError: an operator that ONNX or its exporter does not have, with the layer that calls it; or a network too
            large for one file.
    """
    size = sum(value.nbytes for value in network.model.state_dict().values())
    if size > LARGEST:
        raise ExportError(
            f"format=onnx: the weights take {size / 1e9:.1f} GB, and one file of ONNX holds at most 2 GB: "
            "take format=torch or format=safetensors"
        )
    model = convert(capture(network), network.output)
    path.write_bytes(model.SerializeToString(deterministic=True))


def convert(program: ExportedProgram, output: str) -> Any:
    """Return the onnx.ModelProto of a captured network, optimised, checked, and without paths of this machine."""
    import onnx

    with (
        warnings.catch_warnings(),
        only_errors("torch.onnx", "onnxscript", "onnx_ir"),
    ):  # notes of the exporter on itself
        warnings.simplefilter("ignore")
        try:
            found = torch.onnx.export(
                program,
                dynamo=True,
                external_data=False,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[output],
                verbose=False,
            )
        except Exception as error:
            raise ExportError(_refusal(program, error)) from error
        model = found.model_proto
    clear(model)
    _name_batch(model)
    onnx.checker.check_model(model)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    return model


def clear(message: Any) -> None:
    """Remove the notes of the exporter from a protobuf message and all inside it: stack traces with paths, class names."""
    for name in ("metadata_props", "doc_string"):
        if name in message.DESCRIPTOR.fields_by_name:
            message.ClearField(name)
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "DESCRIPTOR") else value:
                clear(part)


def _name_batch(model: Any) -> None:
    """Give the number of images its name; a captured program has forgotten it."""
    old = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    graph = model.graph
    for value in [*graph.input, *graph.output, *graph.value_info]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(rf"\b{old}\b", BATCH, dim.dim_param)


def _refusal(program: ExportedProgram, error: BaseException) -> str:
    """Say which operator ONNX has no equivalent of, and which layers call it."""
    while error.__cause__ is not None:
        error = error.__cause__
    found = UNKNOWN.search(str(error))
    if not found:
        return f"format=onnx: the exporter fails: {first_lines(error)}"
    name = f"{found[1]}.{found[2]}"
    decomposed = program.run_decompositions(torch._decomp.decomposition_table)  # down to where the exporter gave up
    nodes = [node for node in decomposed.graph.nodes if str(node.target) == name]
    layers = ", ".join(dict.fromkeys(filter(None, (layer_of(node.meta) for node in nodes)))) or "a layer without a name"
    return (
        f"format=onnx: ONNX has no equivalent of the operator {found[1]}, which is called in {layers}: "
        "replace it in the network, or take another format (format=torch)"
    )
