"""From a network to a graph of its operators with a free batch size: what every format but safetensors is made from."""

import types
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from slimming.channels.copying import copy_model
from slimming.channels.layers import SelectBatchNorm
from slimming.errors import ExportError
from slimming.records import Record

INPUT, OUTPUT, BATCH = "images", "logits", "batch"  # names in every artefact that has names


@dataclass
class Network:
    """What is exported.

    Attributes:
        model: any network of images, in any mode and precision; it stays as it is.
        image: (C, H, W) of its input.
        record: how to rebuild it, for the formats that hold that.
        output: name of what it gives, for the formats that have names.
    """

    model: nn.Module
    image: tuple[int, int, int]
    record: Record
    output: str = OUTPUT

    @property
    def example(self) -> Tensor:
        """Two images, as a batch of one would be taken for a constant; normal, the same ones each time."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(2, *self.image, generator=generator)


def plain_copy(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode, float32, on the CPU; it gathers where it scattered, as engines are slow at that."""
    copy = copy_model(model).cpu().float().eval()
    for norm in copy.modules():
        if isinstance(norm, SelectBatchNorm) and norm.scatter is not None:
            source = torch.full(
                (norm.width,), norm.num_features
            )  # where each output channel comes from; the last: zeros
            source[norm.scatter] = torch.arange(norm.num_features)
            norm.register_buffer("source", source, persistent=False)
            norm.scattered = types.MethodType(_gathered, norm)  # type: ignore[method-assign]
    return copy


def _gathered(norm: Any, x: Tensor) -> Tensor:
    """Do what `SelectBatchNorm.scattered` does, by a gather from x and one channel of zeros."""
    padded = F.pad(x, (0, 0) * (x.ndim - 2) + (0, 1))
    return padded.index_select(1, norm.source)


def capture(network: Network) -> ExportedProgram:
    """Return the network's operators as torch.export finds them, for any number of images.

    Raises:
        ExportError: the network's code depends on its input's values, or on the number of images.
    """
    model, example = plain_copy(network.model), network.example
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(model, (example,), dynamic_shapes=({0: Dim(BATCH)},), strict=False)
        except Exception as error:
            raise ExportError(f"torch.export cannot follow this network: {first_lines(error)}") from error
    outputs = program.graph_signature.user_outputs
    if len(outputs) != 1:
        raise ExportError(f"a network with one output, the logits, can be exported; this one has {len(outputs)}")
    return program


def first_lines(error: BaseException, length: int = 300) -> str:
    """Return what an exporter says, in one line that is not endless."""
    return " ".join(str(error).split())[:length] or type(error).__name__


def layer_of(meta: dict[str, Any]) -> str:
    """Return the name of the layer that a node of a captured graph is from: `features.3 (MaxPool2d)`; "" if unknown."""
    stack = list((meta.get("nn_module_stack") or {}).values())
    if not stack:
        return ""
    name, kind = stack[-1]
    kind = kind if isinstance(kind, str) else kind.__name__
    return f"{name or 'the network itself'} ({kind.rpartition('.')[2]})"
