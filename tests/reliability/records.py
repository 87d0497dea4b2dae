"""What the complete sets leave for the tables: one file of JSON lines per table, where the environment names a folder."""

import json
import os
from pathlib import Path

FOLDER = "SLIMMING_RELIABILITY"


def record(table: str, **row) -> None:
    """Add one row to a table; two workers may write at once, so each has its own file."""
    if folder := os.environ.get(FOLDER):
        worker = os.environ.get("PYTEST_XDIST_WORKER", "alone")
        with (Path(folder) / f"{table}-{worker}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


def read(folder: Path, table: str) -> list[dict]:
    """Return all rows of a table."""
    return [json.loads(line) for path in sorted(folder.glob(f"{table}-*.jsonl")) for line in path.open()]
