"""How an entry script runs a stage. Imports nothing heavy before the configuration is known to be good."""

import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from omegaconf import DictConfig

from slimming.config import check
from slimming.errors import SlimmingError


def launch(stage: str, cfg: DictConfig) -> float:
    """Run a stage in the job's run directory; errors of the user's become one line, without a traceback.

    Returns:
        What the stage returns: the test accuracy.
    """
    hydra = HydraConfig.get()
    try:
        config = check(cfg)
        from slimming import stages

        return getattr(stages, stage)(config, Path(hydra.runtime.output_dir))
    except SlimmingError as error:
        if hydra.mode.name == "MULTIRUN":  # Hydra shows only the first failure, at the end of the sweep
            print(f"job {hydra.job.num} failed: {error}", file=sys.stderr)
        raise CompactHydraException(f"error: {error}") from None
