"""Export a network to a file of its own, proven against it: python export.py checkpoint=<run>/pruned.ckpt."""

import hydra
from omegaconf import DictConfig

from slimming import entry


@hydra.main(version_base="1.3", config_path="configs", config_name="export")
def main(cfg: DictConfig) -> float:
    return entry.run_script("export", cfg)


if __name__ == "__main__":
    main()
