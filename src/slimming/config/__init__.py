"""The command line's configuration: declared in schema.py, checked in checks.py, made known to Hydra in registration.py.

Imported by the entries before anything heavy: no torch, no lightning here.
"""

from slimming.config.checks import DEFAULT_RATIO, check, criterion_name, lists_for_commas, ratios
from slimming.config.registration import DISTRIBUTED, record_folder, tag
from slimming.config.schema import (
    SCHEMAS,
    BenchConfig,
    BudgetConfig,
    DistillConfig,
    ExportConfig,
    FinetuneConfig,
    PruneConfig,
    PruneOptions,
    QuantizeConfig,
    RepairConfig,
    ReportConfig,
    SlimConfig,
    TrainConfig,
    TrainOptions,
    plain,
)

__all__ = [
    "DEFAULT_RATIO",
    "DISTRIBUTED",
    "SCHEMAS",
    "BenchConfig",
    "BudgetConfig",
    "DistillConfig",
    "ExportConfig",
    "FinetuneConfig",
    "PruneConfig",
    "PruneOptions",
    "QuantizeConfig",
    "RepairConfig",
    "ReportConfig",
    "SlimConfig",
    "TrainConfig",
    "TrainOptions",
    "check",
    "criterion_name",
    "lists_for_commas",
    "plain",
    "ratios",
    "record_folder",
    "tag",
]
