"""Tables, figures and one HTML page of all results below a folder."""

import math
from pathlib import Path

from slimming.config import ReportConfig
from slimming.errors import DataError
from slimming.files import remove_temporaries, write_text
from slimming.report import latencies
from slimming.report.collect import Collection, collect
from slimming.report.document import Section, Table, markdown, page
from slimming.report.sections import sections
from slimming.report.tables import TESTED, spreadsheet

KINDS = (
    "tradeoff",
    "sweep",
    "kept",
    "gammas",
    "curves",
    "detections",
    "latencies",
)  # of the pictures that a report makes
SHOWN = ["network", "setting", TESTED, "parameters", "MACs (M)", "latency (ms)"]  # how columns on the screen begin


def report(cfg: ReportConfig, out: Path | None = None) -> float:
    """Write report.md, report.csv, report.html and their pictures from the result.json files below `cfg.runs`.

    `out` is not used: all stages have the same signature, and here `cfg.out` says where everything goes.

    Raises:
        DataError: no such folder, or no usable result in it.
    """
    folder = Path(cfg.runs)
    if not folder.is_dir():
        raise DataError(f"runs={cfg.runs} is not a folder")
    found = collect(folder)
    benches, useless = latencies.collect(folder)
    found.unusable += useless
    if not found.runs and not found.failed and not benches:
        skipped = f"; skipped: {'; '.join(' '.join(u) for u in found.unusable)}" if found.unusable else ""
        raise DataError(f"runs={cfg.runs} holds no result.json of a finished or failed run{skipped}")
    target = Path(cfg.out or folder)
    pictures = target / "figures"
    pictures.mkdir(parents=True, exist_ok=True)
    remove_temporaries(pictures)
    for old in (f for kind in KINDS for f in pictures.glob(f"{kind}_*.png")):
        old.unlink()
    made = [*sections(found, pictures), *latencies.sections(benches, pictures)]
    title = f"Network Slimming: {folder.resolve().name}"
    write_text(target / "report.md", markdown(title, made, target))
    write_text(target / "report.csv", spreadsheet(found, folder).csv())
    write_text(target / "report.html", page(title, made))
    _print(found, made)
    print(f"{len(found.runs)} runs -> {target / 'report.html'}, report.md, report.csv")
    return math.nan


def _print(found: Collection, made: list[Section]) -> None:
    """Print of every experiment its title, its headline and the main columns of its table of stages."""
    for section in made:
        stages = [part for below in section.sections if below.title == "stages" for part in below.parts]
        for table in (part for part in stages if isinstance(part, Table)):
            shown = table.columns([head for head in table.head if head.startswith(tuple(SHOWN))]).text()
            print(f"\n{section.title}\n" + f"{section.headline}\n" * bool(section.headline) + shown)
    print()
    for name, why in found.unusable:
        print(f"skipped {name}: {why}")
    for name, stage, error in found.failed:
        print(f"{name}: {stage} failed: {error}")
