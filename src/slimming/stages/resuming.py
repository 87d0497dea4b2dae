"""Going on with a training that was interrupted."""

from pathlib import Path

from slimming import checkpoint
from slimming.checkpoint import Checkpoint
from slimming.data import ImageData
from slimming.errors import CheckpointError, RunDirectoryError
from slimming.records import config_differences

LAST = "last.ckpt"
PROGRESS = {"epoch": int, "global_step": int, "loops": dict, "optimizer_states": list, "lr_schedulers": list}


def resume_point(resume: bool, config: dict, out: Path) -> Checkpoint | None:
    """Return out/last.ckpt to go on from, None if there is none yet.

    Raises:
        RunDirectoryError: there is a run, and `resume` is false or it has another configuration.
        CheckpointError: unreadable.
    """
    path = out / LAST
    if not path.exists():
        return None
    if not resume:
        raise RunDirectoryError(
            f"{out} holds a run already: go on with it by resume=true, or give another hydra.run.dir"
        )
    saved = checkpoint.read(path)
    before = saved.record.need(path, "config").config or {}
    if odd := [k for k, kind in PROGRESS.items() if not isinstance(saved.content.get(k), kind)]:
        raise CheckpointError(f"{path} cannot be resumed: its {odd[0]} is not there or malformed")
    if differences := config_differences(before, config):
        raise RunDirectoryError(
            f"{out} holds a run with another configuration: {differences}. "
            "Give the same values to resume it, or start another run with init_from"
        )
    return saved


def check_same_data(before: dict | None, data: ImageData, out: Path) -> None:
    """Raise CheckpointError if the data are not those that the run began with, as far as their statistics tell."""
    if before is not None and (differences := config_differences({"data": before}, {"data": data.statistics()})):
        raise CheckpointError(
            f"the data have changed since {out} began: {differences}. Put them back to resume it, or start another run"
        )
