"""Network Slimming (Liu et al., ICCV 2017): sparse training, exact channel pruning, fine-tuning.

The names below are loaded when first used (PEP 562): `import slimming` costs nothing, and the core never pulls in
Lightning, Hydra or matplotlib.
"""

import importlib

_HOME = {
    "Budget": "channels.criteria",
    "GlobalRatio": "channels.criteria",
    "OptimalThreshold": "channels.criteria",
    "Penalty": "channels.penalty",
    "PerLayerRatio": "channels.criteria",
    "PruningPlan": "channels.plan",
    "SlimmingCallback": "training.callback",
    "SlimmingError": "errors",
    "SlimmingModule": "training.module",
    "Threshold": "channels.criteria",
    "calibrate": "channels.calibrate",
    "cost": "channels.cost",
    "load": "checkpoint",
    "mask": "channels.proof",
    "prune": "channels.surgery",
    "prune_optimizer_state": "channels.surgery",
    "repair": "channels.repair",
    "save": "checkpoint",
    "trace": "channels.trace",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'slimming' has no attribute {name!r}")
    return getattr(importlib.import_module(f"slimming.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
