"""Small networks as files of every kind, for the tests of deployment."""

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from slimming import models
from slimming.deploy.onnx_format import clear


def small_vgg(widths=(8, "M", 12), classes: int = 5, seed: int = 0) -> nn.Module:
    """A small VGG for images of (3, 8, 8) whose BatchNorms are not those of a fresh network."""
    torch.manual_seed(seed)
    model = models.build("vgg", depth=11, widths=list(widths), num_classes=classes).eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.2, 1.0)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return model


def balanced(model: nn.Module, images: np.ndarray) -> nn.Module:
    """Shift the logits of a network with a `classifier` so that random images fall into all classes."""
    with torch.no_grad():
        model.classifier.bias -= model(torch.from_numpy(images)).mean(0)
    return model


def onnx_bytes(model: nn.Module, size: int = 8, *, batch: int | None = None) -> bytes:
    """Export a network to ONNX with a dynamic batch, or a fixed one."""
    shapes = None if batch else ({0: torch.export.Dim("batch")},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (torch.zeros(batch or 2, 3, size, size),),
            dynamo=True,
            dynamic_shapes=shapes,
            external_data=False,
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    clear(program.model_proto)
    return program.model_proto.SerializeToString()


def written(model: nn.Module, folder: Path) -> dict[str, Path]:
    """Write a network of (3, 8, 8) as .onnx, .pt2 and .xml; return the files by suffix."""
    import openvino

    paths = {suffix: folder / f"small{suffix}" for suffix in (".onnx", ".pt2", ".xml")}
    paths[".onnx"].write_bytes(onnx_bytes(model))
    example, batch = (torch.zeros(2, 3, 8, 8),), torch.export.Dim("batch")
    torch.export.save(torch.export.export(model, example, dynamic_shapes=({0: batch},)), paths[".pt2"])
    openvino.save_model(openvino.convert_model(paths[".onnx"]), paths[".xml"], compress_to_fp16=False)
    return paths
