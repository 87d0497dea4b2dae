"""Run the complete sets of faults and write results/reliability.md from what they gave: what `make test-all` ends with.

python benchmarks/reliability.py [--from FOLDER]    # FOLDER: rows that an earlier run has left, instead of running
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch

from slimming.stages.recording import versions

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/reliability"))

from records import FOLDER, read  # noqa: E402

TEXT = """# Reliability

`make test-all` runs the complete sets below and writes this page (`make test` takes a seeded sample of each).
{machine}, {cores} cores, torch {torch}; {time}.

## Saboteurs of the surgery: {caught} caught / {tried} that change the function

Each saboteur breaks the thin network, its plan, the code of the surgery or the masked network in one way; then the proof is
asked. Whether anything changed is measured apart from it, on 18 random images in float64, as more than 1e-8 of the largest
output. "Dormant": caught, though no image of the judge shows it. "Within rounding": between 1e-12 and 1e-8.

{surgery}

{saboteurs}

## Saboteurs of data, penalty and resume: {noticed} of {patches} noticed

{pipeline}

## Kills: {kills}, {wrong} of them ended otherwise than an undisturbed run

`kill -9` (`terminated`: SIGTERM; `writing`: in the middle of a checkpoint) at a seeded moment of the time that an undisturbed
run takes, then the same command; weights, optimizer states, metrics and results are compared bit for bit, but for times.

{killed}

## Damaged files: {files}, {faults} answered by something else than a valid object or an error of ours

1 GiB of memory beyond an idle process, 20 s a file, nothing written, started or connected to outside the folder.

{fuzz}
"""


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in lines)


def surgery(rows: list[dict]) -> dict:
    kinds = ("caught", "missed", "dormant", "within rounding", "no change")
    per_net, per_saboteur = defaultdict(Counter), defaultdict(Counter)
    for row in rows:
        per_net[row["network"], row["ties"]][row["verdict"]] += 1
        per_saboteur[row["saboteur"]][row["verdict"]] += 1
    total = Counter(row["verdict"] for row in rows)
    lines = lambda counts: [[*(k if isinstance(k, tuple) else (k,)), *(c[v] for v in kinds)] for k, c in counts]  # noqa: E731
    return {
        "caught": total["caught"],
        "tried": total["caught"] + total["missed"],
        "surgery": table(["network", "ties", *kinds], lines(per_net.items())),
        "saboteurs": table(["saboteur", *kinds], lines(sorted(per_saboteur.items()))),
    }


def filled(folder: Path, seconds: float | None) -> str:
    """Return the page for the rows in a folder."""
    pipeline, kills, fuzz = (read(folder, name) for name in ("pipeline", "kills", "fuzz"))
    made = versions()
    values = surgery(read(folder, "surgery")) | {
        "machine": made["machine"].partition(",")[0],
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "time": f"{seconds / 60:.0f} minutes" if seconds else "put together from several runs",
        "noticed": sum(row["caught"] for row in pipeline),
        "patches": len(pipeline),
        "pipeline": table(
            ["saboteur", "test that fails", "noticed"],
            [[r["saboteur"], f"`{r['test']}`", "yes" if r["caught"] else "**no**"] for r in pipeline],
        ),
        "kills": sum(row["kills"] for row in kills),
        "wrong": sum(len(row["wrong"]) for row in kills),
        "killed": table(
            [
                "command",
                "seconds undisturbed",
                "kills",
                "before its end",
                "went on inside a training",
                "ended otherwise",
            ],
            [
                [r["command"], f"{r['seconds']:.1f}", r["kills"], r["before_the_end"], r["resumed"], len(r["wrong"])]
                for r in kills
            ],
        ),
        "files": f"{sum(row['files'] for row in fuzz):,}",
        "faults": sum(row["fault"] for row in fuzz),
        "fuzz": table(
            ["loader", "files", "valid objects", "errors of ours", "anything else"],
            [[r["loader"], r["files"], r["object"], r["error"], r["fault"]] for r in fuzz],
        ),
    }
    return TEXT.format(**values)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--from", dest="folder", type=Path)
    given = parser.parse_args().folder
    if given:
        (ROOT / "results/reliability.md").write_text(filled(given, None))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal", "-m", "complete"]
        code = subprocess.run(command, cwd=ROOT, env=os.environ | {FOLDER: folder}).returncode
        (ROOT / "results/reliability.md").write_text(filled(Path(folder), time.monotonic() - start))
    return code


if __name__ == "__main__":
    sys.exit(main())
