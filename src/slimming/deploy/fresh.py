"""An artefact loaded in a process of its own, which has never seen the network that it was made from."""

import contextlib
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from slimming.errors import ExportError

SOURCE = Path(__file__).parents[2]  # what holds the package `slimming`


@contextlib.contextmanager
def fresh_process(path: Path) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
    """Give the function that an artefact computes, in a process of its own until the block ends.

    Raises:
        ExportError: the artefact cannot be loaded or run; the message ends with what the engine says.
    """
    search = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "slimming.deploy.fresh", str(path.resolve())]
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=told,
            env={**os.environ, "PYTHONPATH": search},
            cwd=path.parent,  # Python looks for modules there first of all
        )

        def run(images: np.ndarray) -> np.ndarray:
            try:
                _send(process.stdin, images)
                return _receive(process.stdout)
            except (OSError, EOFError, ValueError) as error:
                process.wait()
                told.seek(0)
                last = told.read().decode(errors="replace").strip().rpartition("\n")[2][:300]
                raise ExportError(f"{path.name} was written, but a fresh process cannot run it: {last}") from error

        try:
            yield run
        finally:
            process.kill()
            process.communicate()


def _send(stream: Any, array: np.ndarray) -> None:
    packed = io.BytesIO()  # NumPy reads and writes files that can be searched; a pipe cannot
    np.save(packed, array, allow_pickle=False)
    stream.write(len(packed.getbuffer()).to_bytes(8, "little") + packed.getvalue())
    stream.flush()


def _receive(stream: Any) -> np.ndarray:
    """Read what `_send` has written; EOFError where nothing comes."""
    length = int.from_bytes(stream.read(8), "little")
    if not length:
        raise EOFError
    return np.load(io.BytesIO(stream.read(length)), allow_pickle=False)


def serve(path: Path) -> None:
    """Be that process: images come in on stdin, logits go out on stdout, until stdin ends."""
    from slimming.deploy.engines import READS, cores, open_engine

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever an engine prints is no answer
    engine = open_engine(path, READS[path.suffix][0], cores())
    with contextlib.suppress(EOFError):
        while True:
            _send(answers, engine(_receive(sys.stdin.buffer)))


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
