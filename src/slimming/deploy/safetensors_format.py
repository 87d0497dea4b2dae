"""safetensors: the weights as plain arrays, and in the file's header the architecture, as `slimming` rebuilds it."""

import json
from pathlib import Path

from torch import nn

from slimming import checkpoint
from slimming.deploy.capturing import Network
from slimming.errors import CheckpointError, ExportError
from slimming.records import Record

SUFFIXES = (".safetensors",)
PACKAGES = ("safetensors",)
EXTRA = "export"
KEY = "slimming"  # of the record in the header; the only one, as several would be written in any order


def write(network: Network, path: Path) -> None:
    """Write the weights, in their own precision, and what the network is built from; nothing of its training.

    Raises:
        ExportError: the network is not one of slimming.models, so that no record rebuilds it.
    """
    from safetensors.torch import save_file

    record = network.record
    if record.model is None:
        raise ExportError(
            "format=safetensors describes networks of slimming.models, and this one is of a class of your own: "
            "take another format"
        )
    kept = Record(record.model, record.plans, data=record.data, low_rank=record.low_rank)
    weights = {key: value.detach().cpu().contiguous().clone() for key, value in network.model.state_dict().items()}
    save_file(weights, path, {KEY: json.dumps(kept.to_dict(), sort_keys=True)})


def rebuild(path: Path | str) -> nn.Module:
    """Rebuild the network of a file, in eval mode on the CPU; errors as `read`."""
    return checkpoint.rebuild(read(path))


def read(path: Path | str) -> checkpoint.Checkpoint:
    """Read a file as if it were a checkpoint of its network.

    Raises:
        CheckpointError: missing, damaged, or not written by `export.py format=safetensors`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            record = json.loads((file.metadata() or {}).get(KEY, "null"))
            weights = {checkpoint.PREFIX + key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    return checkpoint.checked({"state_dict": weights, "slimming": record}, path)
