"""Fine-tune a pruned network: python finetune.py checkpoint=<run>/pruned.ckpt."""

import hydra
from omegaconf import DictConfig

from slimming import entry


@hydra.main(version_base="1.3", config_path="configs", config_name="finetune")
def main(cfg: DictConfig) -> float:
    return entry.run_script("finetune", cfg)


if __name__ == "__main__":
    main()
