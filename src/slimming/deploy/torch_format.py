"""A program of torch.export (.pt2): for torch without the network's code, and for its compilers."""

from pathlib import Path

import torch
from torch.export import ExportedProgram

from slimming.deploy.capturing import Network, capture

SUFFIXES = (".pt2",)
PACKAGES = ()
EXTRA = "export"


def write(network: Network, path: Path) -> None:
    """Write a network with a free batch size; BatchNorms stay, as torch's compilers fold them.

    Raises:
        ExportError: as `capture`.
    """
    program = capture(network)
    clear(program)
    torch.export.save(program, path)


def clear(program: ExportedProgram) -> None:
    """Remove what a captured program tells of this machine's files: where in which file every operator was called."""
    for module in program.graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            node.meta = {key: value for key, value in node.meta.items() if key == "val"}
    program._example_inputs = None  # two random images; nobody needs them
    program.module_call_graph[1:] = []
