"""The stages: plain functions of a configuration and a folder. The only room that wires the others together."""

from slimming.stages.finetuning import finetune
from slimming.stages.pruning import prune
from slimming.stages.training import train

__all__ = ["finetune", "prune", "train"]
