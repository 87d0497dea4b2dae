"""Repair of a pruned network by least squares; see refit.py."""

from slimming.channels.repair.refit import Repaired, refit, repair

__all__ = ["Repaired", "refit", "repair"]
