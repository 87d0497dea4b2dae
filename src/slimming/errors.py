"""Errors meant for the user: one message that names the key, the value, what is allowed and what to do."""

import math
import numbers
from collections.abc import Iterable
from fnmatch import fnmatchcase


class SlimmingError(ValueError):
    """Base of all errors that the user can mend; entries print its message alone and exit with 1."""


class ConfigError(SlimmingError):
    """A value of the configuration is not usable."""


class DataError(SlimmingError):
    """A data set is missing, incomplete or not what it should be."""

    def __init__(self, message: str):
        if message.startswith("Caught DataError in"):  # a DataLoader's worker tells it with a traceback around
            message = message.strip().splitlines()[-1].partition(": ")[2]
        super().__init__(message)


class CheckpointError(SlimmingError):
    """A checkpoint cannot be read, written or used for this network."""


class RunDirectoryError(CheckpointError, ConfigError):
    """The run directory is another run's, finished, interrupted or still going on: nothing was written there."""


class TrainingError(SlimmingError):
    """A training cannot go on."""


class ExportError(SlimmingError):
    """A network cannot be written in a format, or what was written does not compute what the network computes."""


class LatencyError(SlimmingError):
    """A latency cannot be measured here, or a table of latencies is of another machine or network."""


def check_number(
    key: str,
    value,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
    whole: bool = False,
    words: tuple[str, ...] = (),
) -> None:
    """Raise ConfigError unless `value` is a finite number in [low, high], whole if asked.

    Args:
        above, below: leave out the lower or upper bound itself.
        words: that may stand instead of a number.
    """
    if isinstance(value, str) and value in words:
        return
    kind = numbers.Integral if whole else numbers.Real
    good = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
    if good and (low < value if above else low <= value) and (value < high if below else value <= high):
        return
    bounds = [f"{'>' if above else '>='} {low:g}"] * (low > -math.inf)
    bounds += [f"{'<' if below else '<='} {high:g}"] * (high < math.inf)
    instead = "".join(f"{word} or " for word in words)
    raise ConfigError(
        f"{key} must be {instead}a {'whole ' * whole}number {' and '.join(bounds)}, got {value!r}".strip()
    )


def check_choice(key: str, value, allowed) -> None:
    """Raise ConfigError unless `value` is one of `allowed`."""
    if value not in list(allowed):
        raise ConfigError(f"{key} must be one of {', '.join(map(str, allowed))}; got {value!r}")


def check_patterns(key: str, patterns: Iterable[str], names: Iterable[str], kind: str) -> None:
    """Raise ConfigError unless every shell pattern matches one of `names`, which are of layers of a `kind`."""
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"{key}: {pattern!r} matches no {kind}; there are {', '.join(names[:8]) or 'none'}")


class GraphError(SlimmingError):
    """A network cannot be watched, or nothing in it can be pruned."""


class PlanError(SlimmingError):
    """A pruning plan is not valid, or not for this network."""
