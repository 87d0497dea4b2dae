"""Report on all runs below a folder: python report.py runs=<folder>."""

import hydra
from omegaconf import DictConfig

from slimming import entry


@hydra.main(version_base="1.3", config_path="configs", config_name="report")
def main(cfg: DictConfig) -> float:
    return entry.run_script("report", cfg)


if __name__ == "__main__":
    main()
