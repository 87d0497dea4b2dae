"""How an entry script runs a stage. Imports nothing heavy before the configuration is known to be good."""

import contextlib
import json
import shutil
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from omegaconf import DictConfig

from slimming.config import check
from slimming.errors import SlimmingError

RESUME = {"train": "resume=true ", "finetune": "resume=true ", "slim": ""}


def launch(stage: str, cfg: DictConfig) -> float:
    """Run a stage in the job's run directory; errors of the user's become one line, without a traceback.

    Returns:
        What the stage returns: the test accuracy.
    """
    hydra = HydraConfig.get()
    out = Path(hydra.runtime.output_dir)
    try:
        config = check(cfg)
        from slimming import stages

        return getattr(stages, stage)(config, out)
    except (SystemExit, KeyboardInterrupt):  # Lightning turns Ctrl-C into the first
        if stage in RESUME:
            print(f"interrupted: the same command with {RESUME[stage]}hydra.run.dir={out} goes on", file=sys.stderr)
        raise
    except SlimmingError as error:
        if hydra.mode.name == "MULTIRUN":  # Hydra shows only the first failure, at the end of the sweep
            print(f"job {hydra.job.num} failed: {error}", file=sys.stderr)
            if not (out / "result.json").exists():  # so that a report can tell of it
                failure = {"format": 1, "status": "failed", "error": str(error), "stage": stage}
                (out / "result.json").write_text(json.dumps(failure))
        raise CompactHydraException(f"error: {error}") from None
    finally:
        _tidy(out)


def _tidy(out: Path) -> None:
    """Remove a run directory in which the stage left nothing, with the empty ones above it."""
    if out == Path.cwd() or any(entry.name != ".hydra" for entry in out.iterdir()):
        return
    shutil.rmtree(out / ".hydra", ignore_errors=True)
    with contextlib.suppress(OSError):
        for folder in (out, *out.parents[:2]):
            folder.rmdir()
