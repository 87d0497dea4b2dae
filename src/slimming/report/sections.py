"""What a report says: one section per experiment, made from the collected runs alone."""

import shutil
from pathlib import Path

from slimming.files import replacing
from slimming.report import comparisons, figures, tables, words
from slimming.report.collect import Collection
from slimming.report.comparisons import Points
from slimming.report.document import Section, Table
from slimming.report.headline import headline
from slimming.report.outcomes import Kind, Outcome, outcomes
from slimming.report.runs import DETECTIONS, Run

PRUNED = (Kind.BEFORE_CALIBRATION, Kind.CALIBRATED, Kind.REPAIRED, Kind.FINETUNED)
FEWEST_RATIOS = 3  # of a setting that gets a curve
MOST_ROWS = 24  # of the picture of the architectures


def sections(found: Collection, pictures: Path) -> list[Section]:
    """Return a section per experiment, that is a network and a data set; figures go into the folder `pictures`."""
    groups: dict[str, list[Run]] = {}
    for run in found.runs:
        size = f", {run.dense['num_params']:,} parameters dense" if run.dense else ""
        groups.setdefault(f"{run.result['model']} on {run.result.get('data')}{size}", []).append(run)
    made = [experiment(title, runs, pictures) for title, runs in groups.items()]
    troubles = _troubles(found)
    return [*made, troubles] if troubles.parts else made


def experiment(title: str, runs: list[Run], pictures: Path) -> Section:
    """Return headline, trade-off and, as sections below it, all that the runs have data for."""
    made, slug, score = outcomes(runs), _slug(title), runs[0].score
    section = Section(title)
    if found := headline(made):
        section.headline, explanation = found
        section.parts.append(explanation)
    if panels := tradeoff_panels(made):
        comparisons.tradeoff(panels, pictures / f"tradeoff_{slug}.png", score.called)
        section.parts.append(pictures / f"tradeoff_{slug}.png")
    curves = sweep_curves(made)
    below = [
        Section("stages", [tables.stages_note(runs), tables.stages(made)]),
        Section(f"{score.called} against the ratio", _sweep(made, curves, pictures / f"sweep_{slug}.png")),
        Section("architectures", _architectures(made, [*curves], pictures / f"kept_{slug}.png")),
        Section("|gamma| after sparse training", _gammas(runs, pictures, slug)),
        Section(f"loss and {score.called}", _curves(runs, pictures, slug)),
        Section("detections", _detections(runs, pictures, slug)),
        Section("passes", _unless_empty(tables.passes(runs))),
        Section("published numbers", _unless_empty(tables.published(runs), "Published by others, not measured here:")),
    ]
    section.sections = [part for part in below if part.parts]
    return section


def tradeoff_panels(made: list[Outcome]) -> dict[str, Points]:
    """Return the points of all outcomes over their costs, by the label of the axis; {} where nothing pruned was tested.

    Costs are shares of the dense network's, latencies those of the same measurement: machines and loads differ less then.
    """
    costs = {"MACs (% of the dense network)": lambda run: run.share("macs")}
    costs["latency (% of the dense network)"] = lambda run: run.latency_share if run.passes else 1.0
    panels = {}
    for label, cost in costs.items():
        points: Points = {}
        for outcome in made:
            if outcome.kind in comparisons.STYLES and (point := outcome.point(cost)):
                points.setdefault(outcome.kind, []).append(point)
        if any(points.get(kind) for kind in PRUNED):
            panels[label] = points
    return panels


def sweep_curves(made: list[Outcome]) -> dict[str, Points]:
    """Return points over the removed channels by setting, for as many settings as can be told apart.

    They are those with the most ratios; of equally many, those that are most accurate when calibrated.
    """
    settings: dict[str, Points] = {}
    for outcome in made:
        if outcome.kind in PRUNED and outcome.first.passes and (point := outcome.point(lambda run: run.removed)):
            settings.setdefault(words.setting(outcome.first), {}).setdefault(outcome.kind, []).append(point)

    def rank(points: Points) -> tuple[int, float]:
        return -len(points.get(Kind.BEFORE_CALIBRATION, [])), -max(
            (p.y for p in points.get(Kind.CALIBRATED, [])), default=0
        )

    several = {k: v for k, v in settings.items() if len(v.get(Kind.BEFORE_CALIBRATION, [])) >= FEWEST_RATIOS}
    return dict(sorted(several.items(), key=lambda item: rank(item[1]))[: len(comparisons.SETTINGS)])


def _sweep(made: list[Outcome], curves: dict[str, Points], path: Path) -> list:
    table = tables.ratios(made)
    if len({row[table.head.index("removed")] for row in table.rows}) < 2:
        return []
    if not curves:
        return [table]
    comparisons.sweep(curves, path, called=made[0].first.score.called)
    drawn = f"Drawn: {'; '.join(curves)}. Several seeds are one point with its standard deviation."
    return [drawn, path, table]


def _architectures(made: list[Outcome], drawn: list[str], path: Path) -> list:
    found = [o for o in made if o.kind is Kind.BEFORE_CALIBRATION]
    known = ("widths", "widths_before")
    runs = {run: len(o.runs) > 1 for o in found for run in o.runs if all(run.result.get(key) for key in known)}
    if not runs:
        return []
    table = tables.architectures([*runs])
    rows = []
    for run in ([run for run in runs if words.setting(run) in drawn] or [*runs])[:MOST_ROWS]:
        setting, seed, removed = tables.architecture_name(run)
        name = f"{setting}{f', seed {seed}' * runs[run]}: {removed} removed"
        rows.append((name, run.prunings[0].result.get("widths_before") or [], run.result["widths"]))
    if len({len(widths) for _, *both in rows for widths in both}) > 1:  # whole BatchNorms went: no common axis
        return [table]
    comparisons.kept(rows, path)
    return [path, table]


def _gammas(runs: list[Run], pictures: Path, slug: str) -> list:
    parts: list = []
    for run in runs:
        record = run.result.get("gammas") or {}
        if run.role != "sparse" or not any((record.get("counts") or [[]])[-1]):
            continue
        children = [r.result for r in runs if r.parent is run and r.role == "pruned"]
        marks = {_threshold(child) for child in children} - {None}
        path = pictures / f"gammas_{slug}_{len(parts) // 2}.png"
        comparisons.thresholds(record["counts"][-1], record["edges"], sorted(marks), path)
        where = f", pass {run.passes + 1}" if run.passes else ""
        lines = "; dashed: the thresholds of its prunings" if marks else ""
        parts += [f"{words.training(run)}, seed {run.result.get('seed')}{where}{lines}.", path]
    return parts


def _threshold(result: dict) -> tuple[float, str] | None:
    """Return the threshold of a pruning and its name, if there is one for all layers and it is one of gammas."""
    value, asked = (result.get("gammas") or {}).get("threshold"), result["ratio"].get("asked")
    if not value or result.get("score") != "gamma":
        return None
    return value, f"ratio {asked:g}" if asked is not None else f"{value:.2g}"


def _curves(runs: list[Run], pictures: Path, slug: str) -> list:
    trained = [run for run in runs if run.epochs]
    parents = {x for run in trained for x in run.chain[:-1]}
    names = {"finetuned": "fine-tuned", "scratch": "from scratch"}
    parts: list = []
    for number, last in enumerate(run for run in trained if run not in parents):
        chain = [run for run in last.chain if run.epochs] if last.role != "scratch" else [last]
        path = pictures / f"curves_{slug}_{number}.png"
        figures.timeline(
            [(names.get(run.role, run.role), run.result["history"]) for run in chain], path, score=last.score
        )
        name = words.network(outcomes([last])[0])
        parts += [f"{name} [{words.setting(last)}], seed {last.result.get('seed')}.", path]
    return parts


def _detections(runs: list[Run], pictures: Path, slug: str) -> list:
    parts: list = []
    for run in (run for run in runs if (run.folder / DETECTIONS).is_file()):
        path = pictures / f"detections_{slug}_{len(parts) // 2}.png"
        with replacing(path) as temporary:
            shutil.copyfile(run.folder / DETECTIONS, temporary)
        parts += [f"{words.network(outcomes([run])[-1])} [{words.setting(run)}], seed {run.result.get('seed')}.", path]
    return parts


def _unless_empty(table: Table, text: str = "") -> list:
    return [*[text] * bool(text), table] if table.rows else []


def _troubles(found: Collection) -> Section:
    parts: list = []
    if found.failed:
        failed = Table(["run", "stage", "error"], [[*row] for row in found.failed], left=3)
        parts += ["These runs say of themselves that they failed:", failed]
    if found.unusable:
        unusable = Table(["file", "why"], [[*row] for row in found.unusable], left=2)
        parts += ["These files were skipped:", unusable]
    return Section("What failed, what was skipped", parts)


def _slug(title: str) -> str:
    """Turn a title into a file name: `vgg19_on_cifar10_1255546`."""
    return "_".join("".join(c if c.isalnum() else " " for c in title.replace(",", "").split("param")[0]).split())
