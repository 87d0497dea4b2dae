"""What torchrun, srun and our own launcher say of the other processes of this job. Imports nothing heavy."""

import functools
import os
from datetime import datetime


def rank() -> int:
    """Return the number of this process among those that torchrun or srun started."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


def started() -> str:
    """Return when this job was started, as text for a folder's name: the same on all ranks of torchrun or srun.

    Their clocks differ, and each composes its own configuration; so rank 0 tells the others through torchrun's store, and
    under SLURM the number of the job step stands for the time.
    """
    if int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ:
        return f"slurm-{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_STEP_ID', '0')}"
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")  # microseconds: a loop in a shell starts many in one second
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        return now
    store = _store()
    if int(os.environ["RANK"]) == 0:  # the first that asks; later ones get its answer
        return store.compare_set("slimming/started", "", now).decode()
    return store.get("slimming/started").decode()


@functools.cache
def _store():
    """Connect to torchrun's store; kept open, so that ranks that ask later find it."""
    from torch.distributed.rendezvous import rendezvous

    return next(rendezvous("env://"))[0]


def started_externally() -> bool:
    """Return whether torchrun, srun or `start_ranks` started this process as one of several."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1 or int(os.environ.get("SLURM_NTASKS", 1)) > 1
    return several and any(key in os.environ for key in ("LOCAL_RANK", "SLURM_PROCID"))


def job() -> str | None:
    """Name the job of torchrun or srun that this process is a rank of, the same on all of them; None: of neither."""
    if not started_externally():
        return None
    if "SLURM_PROCID" in os.environ and "RANK" not in os.environ:
        return f"slurm-{os.environ.get('SLURM_JOB_ID')}-{os.environ.get('SLURM_STEP_ID')}"
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def torchrun_devices() -> dict[str, int]:
    """Return the Trainer's {devices, num_nodes} as torchrun has laid them out, {} without it."""
    if not started_externally() or "LOCAL_WORLD_SIZE" not in os.environ:
        return {}
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    return {"devices": here, "num_nodes": int(os.environ["WORLD_SIZE"]) // here}
