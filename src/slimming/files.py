"""Files that are written whole or not at all. Imports nothing of ours, so that all rooms can use it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; what is written there replaces `path` in the end, or is removed on an error.

    Whoever is killed in between leaves `path` as it was, and a temporary file for `remove_temporaries`.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        _synchronise(temporary)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a small text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_temporaries(folder: Path) -> None:
    """Remove what killed writers have left in a folder; nobody may be writing there."""
    for left in folder.glob(".*.tmp"):
        if left.is_file() and not left.is_symlink():
            left.unlink(missing_ok=True)


def _synchronise(path: Path) -> None:
    """Wait until the disk has the content: after a power cut, a renamed file could else be empty."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
