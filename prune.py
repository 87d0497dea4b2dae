"""Prune a trained network: python prune.py checkpoint=<run>/last.ckpt ratio=0.7."""

import hydra
from omegaconf import DictConfig

from slimming import entry


@hydra.main(version_base="1.3", config_path="configs", config_name="prune")
def main(cfg: DictConfig) -> float:
    return entry.run_script("prune", cfg)


if __name__ == "__main__":
    main()
