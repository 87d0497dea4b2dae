"""Time networks side by side: python bench.py models='[a.ckpt,b.onnx]' batch=1,64 threads=1,2."""

import sys

import hydra
from omegaconf import DictConfig

from slimming import entry
from slimming.config import lists_for_commas


@hydra.main(version_base="1.3", config_path="configs", config_name="bench")
def main(cfg: DictConfig) -> float:
    return entry.run_script("bench", cfg)


if __name__ == "__main__":
    sys.argv[1:] = lists_for_commas(sys.argv[1:], ("models", "batch", "threads", "engines"))
    main()
