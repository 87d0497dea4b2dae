"""Several processes for one job: started with the job's own composed configuration, watched, and ended together.

Lightning starts its DDP processes by repeating the command line, so that under Hydra's multirun each of them would begin the
whole sweep. Here the process that Hydra runs stays outside: it starts one process, a rank, per device, and a rank that dies
ends its job, not the sweep.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from slimming import errors as ours
from slimming.errors import SlimmingError, TrainingError
from slimming.files import write_text

POLL_S = 0.1
FOREIGN = ("SLURM_", "TORCHELASTIC_", "GROUP_", "ROLE_", "LOCAL_WORLD_SIZE", "RANK")
GRACE_S = 3.0  # between asking the other ranks to end and ending them


def start_ranks(job: dict, processes: int) -> None:
    """Run `python -m slimming.entry <job folder>` once per device of this machine and wait for all of them.

    Args:
        job: plain data; `run_rank` hands it to the work of every process.

    Raises:
        SlimmingError: the first error of any rank, if it is one of ours.
        TrainingError: a rank was killed, or raised something else (its traceback is on the screen).
        KeyboardInterrupt: Ctrl-C, once all ranks have ended.
    """
    with tempfile.TemporaryDirectory(prefix="slimming-") as folder:
        job_folder = Path(folder)
        (job_folder / "job.json").write_text(json.dumps(job))
        ranks = _start(job_folder, processes)
        try:
            codes = [rank.poll() for rank in ranks]
            while None in codes and not any(codes):
                time.sleep(POLL_S)
                codes = [rank.poll() for rank in ranks]
        except KeyboardInterrupt:  # the terminal sends it to the ranks as well; Lightning closes them down
            _end(ranks, signal.SIGINT)
            raise
        if any(codes):
            time.sleep(2 * POLL_S)  # for errors on their way to the disk
            codes = [rank.poll() for rank in ranks]
            _end(ranks, signal.SIGTERM)
            _raise_first(job_folder, codes)


def _start(job_folder: Path, processes: int) -> list[subprocess.Popen]:
    """Start the ranks; rank 0 talks to the terminal, the others write a log into the job folder."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // processes))
    # What another launcher has said of this process must not reach Lightning in the ranks.
    own = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
    ranks = []
    for rank in range(processes):
        env = own | {key: str(value) for key, value in (shared | {"LOCAL_RANK": rank}).items()}
        log = None if rank == 0 else (job_folder / f"rank-{rank}.log").open("w")
        command = [sys.executable, "-m", "slimming.entry", str(job_folder)]
        ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
        if log:
            log.close()
    return ranks


def _end(ranks: list[subprocess.Popen], sign: int) -> None:
    """Send a signal to the ranks that still run, and kill those that do not end within GRACE_S."""
    for rank in ranks:
        if rank.poll() is None:
            with contextlib.suppress(OSError):
                rank.send_signal(sign)
    deadline = time.monotonic() + GRACE_S
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


def _raise_first(job_folder: Path, codes: list[int | None]) -> None:
    """Raise what went wrong first; what the other ranks say of lost connections is its consequence."""
    errors = sorted(
        (json.loads(p.read_text()) for p in job_folder.glob("error-*.json")), key=lambda error: error["time"]
    )
    killed = [(r, -code) for r, code in enumerate(codes) if code and code < 0]
    # A rank aborts itself when a connection is lost: that signal is the consequence of an error, the others are causes.
    first_killed = [k for k in killed if k[1] != signal.SIGABRT] or ([] if errors else killed)
    if errors and errors[0]["kind"] == "ours":
        raise getattr(ours, errors[0]["class"], SlimmingError)(errors[0]["message"])
    if errors and errors[0]["kind"] == "interrupted":
        raise KeyboardInterrupt
    if first_killed:
        rank, sign = first_killed[0]
        raise TrainingError(f"rank {rank} was killed (signal {sign}; out of memory?); the other ranks were ended")
    if errors:
        print(errors[0]["traceback"], file=sys.stderr)
        raise TrainingError(f"rank {errors[0]['rank']} failed: {errors[0]['message']}; the other ranks were ended")
    rank = next(r for r, code in enumerate(codes) if code)
    log = job_folder / f"rank-{rank}.log"
    output = log.read_text()[-2000:] if log.exists() else ""
    raise TrainingError(
        f"rank {rank} ended with code {codes[rank]} without a message; the other ranks were ended\n{output}"
    )


def run_rank(job_folder: Path, work: Callable[[dict], object]) -> None:
    """Do a rank's work and end the process.

    An error is left in the job folder, where `start_ranks` finds it. The process ends at once, because open connections to
    other ranks would hold it.
    """
    _die_with_parent()
    rank = int(os.environ["LOCAL_RANK"])
    try:
        work(json.loads((job_folder / "job.json").read_text()))
        code = 0
    except BaseException as error:
        with contextlib.suppress(OSError):  # the folder is gone, and with it the process that would read the error
            write_text(job_folder / f"error-{rank}.json", json.dumps(_description(rank, error)))
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _description(rank: int, error: BaseException) -> dict:
    """Describe an error that is being handled as plain data."""
    kind = "ours" if isinstance(error, SlimmingError) else "other"
    if isinstance(error, SystemExit | KeyboardInterrupt):
        kind = "interrupted"
    return {
        "rank": rank,
        "time": time.time(),
        "kind": kind,
        "class": type(error).__name__,
        "message": str(error) if kind == "ours" else f"{type(error).__name__}: {error}",
        "traceback": traceback.format_exc(),
    }


def _die_with_parent() -> None:
    """Ask Linux to end this process when the one that started it ends, however that ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
