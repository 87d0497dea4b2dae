"""The stages: plain functions of a configuration and a folder. The only room that wires the others together."""

from slimming.stages.benching import bench
from slimming.stages.exporting import export
from slimming.stages.finetuning import finetune
from slimming.stages.pipeline import slim
from slimming.stages.pruning import prune
from slimming.stages.reporting import report
from slimming.stages.running import run_on_devices
from slimming.stages.training import train

__all__ = ["bench", "export", "finetune", "prune", "report", "run_on_devices", "slim", "train"]
