"""How an entry script runs a stage. Imports nothing heavy before the configuration is known to be good."""

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from omegaconf import DictConfig

from slimming.config import DISTRIBUTED, check
from slimming.errors import ConfigError, RunDirectoryError, SlimmingError
from slimming.folders import release
from slimming.ranks import rank, started_externally
from slimming.records import write_failure

OTHERS_WAIT_S = 3.0  # an error of all ranks is told by rank 0 alone: the launcher ends the others meanwhile
TERMINATED = 128 + signal.SIGTERM  # the exit code of a run that a cluster's SIGTERM has ended, as a shell would say it
RESUME = {"train": "resume=true ", "finetune": "resume=true ", "slim": ""}


def run_script(stage: str, cfg: DictConfig) -> float:
    """Run a stage in the job's run directory; errors of the user's become one line, without a traceback.

    Returns:
        What the stage returns: the test accuracy.
    """
    hydra = HydraConfig.get()
    out = Path(hydra.runtime.output_dir)
    try:
        config = check(cfg)
        from slimming import stages

        if started_externally():
            _refuse_ranks(stage, hydra.mode.name)
        with _terminable():
            return (
                stages.run_on_devices(stage, config, out)
                if stage in DISTRIBUTED
                else getattr(stages, stage)(config, out)
            )
    except (SystemExit, KeyboardInterrupt):  # Lightning turns Ctrl-C into the first
        if stage in RESUME:
            print(f"interrupted: the same command with {RESUME[stage]}hydra.run.dir={out} goes on", file=sys.stderr)
        raise
    except SlimmingError as error:
        if rank() > 0:
            time.sleep(OTHERS_WAIT_S)
        if hydra.mode.name == "MULTIRUN":  # Hydra shows only the first failure, at the end of the sweep
            print(f"job {hydra.job.num} failed: {error}", file=sys.stderr)
            if not isinstance(error, RunDirectoryError):
                write_failure(out, stage, str(error), over=False)  # so that a report can tell of it
        raise CompactHydraException(f"error: {error}") from None
    finally:
        release(out)
        if rank() == 0:
            _tidy(out)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the run at once as an exception, with exit code 143; Lightning alone would go on, and exit with 0.

    What was being written is then cleared away, and last.ckpt stays that of the last whole epoch.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    own = os.getpid()

    def end(number, frame):
        if os.getpid() != own:  # a process that was forked to fetch data
            os._exit(TERMINATED)
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _refuse_ranks(stage: str, mode: str) -> None:
    """Raise ConfigError where a launcher has started several processes of what must be one."""
    if stage not in DISTRIBUTED:
        raise ConfigError(
            f"{stage}.py takes one process: start it by python {stage}.py, not by torchrun or srun with several tasks"
            + " (it starts its own for trainer.devices > 1)" * (stage == "slim")
        )
    if mode == "MULTIRUN" and "SUBMITIT_EXECUTOR" not in os.environ:
        raise ConfigError(
            "a sweep starts its own processes: python train.py -m trainer.devices=4 ..., without torchrun"
        )


def _tidy(out: Path) -> None:
    """Remove a run directory in which the stage left nothing, with the empty ones above it."""
    if out == Path.cwd() or any(entry.name != ".hydra" for entry in out.iterdir()):
        return
    shutil.rmtree(out / ".hydra", ignore_errors=True)
    with contextlib.suppress(OSError):
        out.rmdir()
        for folder in out.parents[:2]:
            if Path.cwd() not in folder.parents:
                break
            folder.rmdir()


if __name__ == "__main__":  # a rank that `launcher.start_ranks` has started
    from slimming.stages.running import run_rank

    run_rank(Path(sys.argv[1]))
