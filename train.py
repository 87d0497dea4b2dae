"""Train a network with the gamma penalty: python train.py model=vgg19 sparsity=1e-4."""

import hydra
from omegaconf import DictConfig

from slimming import entry


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> float:
    return entry.run_script("train", cfg)


if __name__ == "__main__":
    main()
