"""Tables, figures and one HTML page of all results below a folder."""

import math
from pathlib import Path

from slimming.config import ReportConfig
from slimming.errors import DataError
from slimming.files import remove_temporaries, write_text
from slimming.report.collect import collect
from slimming.report.page import markdown, page, spreadsheet, terminal
from slimming.report.sections import Table, sections

KINDS = ("sweep", "kept", "gammas", "curves")  # of the pictures that a report makes
SHOWN = ["network", "test accuracy (%)", "parameters", "MACs (M)", "latency (ms)"]  # columns on the screen


def report(cfg: ReportConfig, out: Path | None = None) -> float:
    """Write report.md, report.csv, report.html and their pictures from the result.json files below `cfg.runs`.

    `out` is there for the likeness of the stages: `cfg` says where everything goes.

    Raises:
        DataError: no such folder, or no usable result in it.
    """
    folder = Path(cfg.runs)
    if not folder.is_dir():
        raise DataError(f"runs={cfg.runs} is not a folder")
    found = collect(folder)
    if not found.runs and not found.failed:
        skipped = f"; skipped: {'; '.join(' '.join(u) for u in found.unusable)}" if found.unusable else ""
        raise DataError(f"runs={cfg.runs} holds no result.json of a finished or failed run{skipped}")
    target = Path(cfg.out or folder)
    pictures = target / "figures"
    pictures.mkdir(parents=True, exist_ok=True)
    remove_temporaries(pictures)
    for old in (f for kind in KINDS for f in pictures.glob(f"{kind}_*.png")):
        old.unlink()
    made = sections(found, pictures)
    title = f"Network Slimming: {folder.resolve().name}"
    write_text(target / "report.md", markdown(title, made, target))
    write_text(target / "report.csv", spreadsheet(found, folder))
    write_text(target / "report.html", page(title, made))
    for section in made:
        table = next((part for part in section.parts if isinstance(part, Table)), None)
        if table and set(SHOWN) <= set(table.head):
            print(f"\n{section.title}\n{terminal(table, SHOWN)}")
    print()
    for name, why in found.unusable:
        print(f"skipped {name}: {why}")
    for name, stage, error in found.failed:
        print(f"{name}: {stage} failed: {error}")
    print(f"{len(found.runs)} runs -> {target / 'report.html'}, report.md, report.csv")
    return math.nan
