"""One folder, one run: a run claims its directory for as long as it goes on.

A claim is an flock on `<folder>/.lock`, held through an open file: it ends with the process, however that ends, so that a
killed run blocks nothing and the file alone means nothing. Processes that a run forks close the file at once.
"""

import contextlib
import functools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slimming.errors import ConfigError, RunDirectoryError
from slimming.files import remove_temporaries
from slimming.ranks import job, rank, started_externally

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
PATIENCE_S = 0.5  # a rank that only looks holds the lock for a moment
PAUSE_S = 0.05


@dataclass
class _Claim:
    """What this process has claimed.

    Attributes:
        thread: that claimed it.
        descriptor: of the locked file; None where another process of the job has it, or no lock can be had.
    """

    thread: int
    descriptor: int | None


_claims: dict[
    str, _Claim
] = {}  # by real path; a process's open locks are its own global state, whoever keeps the books


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a run directory, made if need be, and clear away what a killed run has left half written.

    What this thread holds already is simply used; on all ranks but the first of torchrun's and srun's it is only looked
    whether their own job holds it.

    Raises:
        RunDirectoryError: another run is going on there; nothing was written.
        ConfigError: the folder cannot be made or written.
    """
    fresh = claim(folder)
    try:
        yield
    finally:
        if fresh:
            release(folder)


@contextlib.contextmanager
def joined(folder: Path) -> Iterator[None]:
    """Share a folder that the process which started this one has claimed for both."""
    _claims[os.path.realpath(folder)] = _Claim(threading.get_ident(), None)
    try:
        yield
    finally:
        release(folder)


def claim(folder: Path) -> bool:
    """Do what `claimed` does, until `release`; return False where this thread holds the folder already."""
    key = os.path.realpath(folder)
    if held := _claims.get(key):
        if held.thread != threading.get_ident():
            raise _taken(folder, _about_me())
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _look(folder) if started_externally() and rank() > 0 else _lock(folder)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}): make room or give another hydra.run.dir"
        ) from error
    _claims[key] = _Claim(threading.get_ident(), descriptor)
    return True


def release(folder: Path) -> None:
    """Give up a claim of this thread, if there is one."""
    key = os.path.realpath(folder)
    held = _claims.get(key)
    if held is None or held.thread != threading.get_ident():
        return
    del _claims[key]
    if held.descriptor is not None:
        if _is(held.descriptor, folder / LOCK):  # else the folder was moved meanwhile
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()  # before the lock goes: afterwards it could be another run's
        os.close(held.descriptor)


def _lock(folder: Path) -> int | None:
    """Return the descriptor of the locked file; None, and a note, where the file system knows no locks."""
    path, deadline = folder / LOCK, time.monotonic() + PATIENCE_S
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            _flock(descriptor, shared=False)
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise _taken(folder, _holder(path)) from None
            time.sleep(PAUSE_S)
        except OSError as error:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            _note_no_locks(str(folder), error.strerror)
            return None
        else:
            if _is(descriptor, path):
                break
            os.close(descriptor)  # removed by a run that ended in this moment
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(_about_me()).encode())
        _close_in_children()
        remove_temporaries(folder)
    except BaseException:  # a full disk: the lock may not outlive the claim that failed
        os.close(descriptor)
        raise
    return descriptor


def _look(folder: Path) -> None:
    """Raise RunDirectoryError if another job holds the folder."""
    path, deadline = folder / LOCK, time.monotonic() + PATIENCE_S
    while (holder := _holder(path)).get("job") != job() and _locked(path):
        if holder or time.monotonic() > deadline:  # a first rank that has just locked it has not said so yet
            raise _taken(folder, holder)
        time.sleep(PAUSE_S)


def _locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        _flock(descriptor, shared=True)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _flock(descriptor: int, shared: bool) -> None:
    if fcntl is None:
        raise OSError(0, "this system has no flock")
    fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def _is(descriptor: int, path: Path) -> bool:
    """Return whether an open file is still the one of that name."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _about_me() -> dict:
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T"), "job": job()}


def _holder(path: Path) -> dict:
    """Return what the holder has written about itself, {} if that cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        holder = json.loads(path.read_text())
        return holder if isinstance(holder, dict) else {}
    return {}


def _taken(folder: Path, holder: dict) -> RunDirectoryError:
    who = (
        " (process {pid} on {host}, since {since})".format(**holder) if {"pid", "host", "since"} <= set(holder) else ""
    )
    return RunDirectoryError(
        f"{folder} is the run directory of a run that is still going on{who}: "
        "wait until it ends, or give another hydra.run.dir"
    )


@functools.cache
def _note_no_locks(folder: str, reason: str) -> None:
    print(
        f"note: {folder} lies on a file system that has no file locks ({reason}): "
        "a second run in the same folder would not be noticed",
        file=sys.stderr,
    )


@functools.cache
def _close_in_children() -> None:
    """Let forked processes (a DataLoader's workers) close the locks: else these would outlive a killed run with them."""

    def close() -> None:
        for held in _claims.values():
            if held.descriptor is not None:
                os.close(held.descriptor)
        _claims.clear()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=close)
