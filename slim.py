"""The whole pipeline: python slim.py model=vgg19 sparsity=1e-4 ratio=0.7."""

import hydra
from omegaconf import DictConfig

from slimming import entry


@hydra.main(version_base="1.3", config_path="configs", config_name="slim")
def main(cfg: DictConfig) -> float:
    return entry.run_script("slim", cfg)


if __name__ == "__main__":
    main()
