"""What other packages log, kept off the screen."""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def only_errors(*names: str) -> Iterator[None]:
    """Let loggers (`""`: the root) tell errors alone until the block ends."""
    logs = [logging.getLogger(name) for name in names]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
