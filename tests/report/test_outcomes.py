"""Seeds of one experiment are one outcome: one row of a table, one point of a picture."""

import json
import random

import pytest
from recorded import pruned, trained, tuned, write

from slimming.report import comparisons, words
from slimming.report.collect import collect
from slimming.report.outcomes import Kind, Outcome, Point, options, outcomes
from slimming.report.runs import plan_count
from slimming.report.sections import sections, sweep_curves, tradeoff_panels


def seeds(folder):
    """Two seeds pruned at 0.5 and fine-tuned; the first one at 0.3 and 0.7 as well."""
    for seed, before, calibrated, after in ((1, 0.2, 0.70, 0.80), (2, 0.4, 0.74, 0.82)):
        write(folder, f"sparse{seed}", trained("sparse", seed, 0.79))
        metrics = {"test/acc_before": 0.79, "test/acc_pruned": before, "test/acc": calibrated}
        write(folder, f"p{seed}", pruned(f"../sparse{seed}/last.ckpt", got=0.48 + 0.02 * seed) | {"metrics": metrics})
        write(folder, f"f{seed}", tuned(f"../p{seed}/pruned.ckpt", seed=seed, accuracy=after))
    for ratio in (0.3, 0.7):
        write(folder, f"s{ratio}", pruned("../sparse1/last.ckpt", ratio))
    return collect(folder)


def close(point, x, y, spread):
    return (point.x, point.y, point.spread) == pytest.approx((x, y, spread), abs=0.01)


def test_seeds_become_one_point_with_its_spread_in_the_pictures(tmp_path, monkeypatch):
    drawn = {}
    for name in ("sweep", "tradeoff"):
        monkeypatch.setattr(comparisons, name, lambda data, path, *_, name=name, **__: drawn.update({name: data}))
    (tmp_path / "figures").mkdir()
    sections(seeds(tmp_path / "runs"), tmp_path / "figures")
    (curve,) = drawn["sweep"].values()
    low, middle, high = curve[Kind.BEFORE_CALIBRATION]
    assert (low.x, low.spread, high.x, high.spread) == pytest.approx((30, 0, 70, 0))
    assert close(middle, 51, 30, 14.14)  # removed 50% and 52%; 20% and 40% accurate
    assert close(curve[Kind.CALIBRATED][1], 51, 72, 2.83)
    assert len(curve[Kind.FINETUNED]) == 1 and close(curve[Kind.FINETUNED][0], 51, 81, 1.41)
    macs, latency = drawn["tradeoff"].values()
    for panel, share in ((macs, 40), (latency, 50)):
        assert len(panel[Kind.FINETUNED]) == 1 and close(panel[Kind.FINETUNED][0], share, 81, 1.41)
        assert len(panel[Kind.BEFORE_CALIBRATION]) == 3
        assert panel[Kind.SPARSE] == [Point(100, 79)]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, []),  # of a version without the option
        ({"reduce": "max"}, []),
        ({"reduce": "mean"}, ["reduce mean"]),
        ({"ties": "apart", "reduce": "max"}, ["ties apart"]),
        ({"ties": "aligned", "reduce": "mean"}, ["ties aligned"]),
        ({"ties": "aligned", "reduce": "sum"}, ["ties aligned", "reduce sum"]),
    ],
)
def test_how_tied_channels_were_scored_is_said_where_it_was_chosen(config, words, tmp_path):
    write(tmp_path, "sparse", trained("sparse"))
    write(tmp_path, "p", pruned("../sparse/last.ckpt", **config))
    (run,) = (run for run in collect(tmp_path).runs if run.role == "pruned")
    assert options(run) == words


def test_points_are_drawn_with_bars_where_there_are_several_seeds_alone(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(comparisons, "save_figure", lambda figure, *_: figures.append(figure))
    curves = {"a": {Kind.CALIBRATED: [Point(10, 80), Point(50, 70, 2.5)]}, "b": {Kind.FINETUNED: [Point(50, 81)]}}
    comparisons.sweep(curves, tmp_path / "sweep.png")
    comparisons.tradeoff({"MACs (%)": curves["a"] | {Kind.BASELINE: [Point(100, 82)]}}, tmp_path / "tradeoff.png")
    for figure in figures:
        bars = [c.lines[2][0].get_segments() for c in figure.axes[0].containers if c.lines[2]]
        assert [segment.tolist() for found in bars for segment in found if len(segment)] == [[[50, 67.5], [50, 72.5]]]
    assert [t.get_text() for t in figures[0].legends[0].texts] == ["a", "b", "calibrated", "fine-tuned"]
    assert [t.get_text() for t in figures[1].legends[0].texts] == ["calibrated", "baseline"]


def test_a_sweep_draws_the_settings_with_the_most_ratios_and_no_more_than_can_be_told_apart(tmp_path):
    write(tmp_path, "sparse", trained("sparse"))
    for number, least in enumerate((4, 3, 5, 3, 2)):
        for i in range(least):
            ratio = 0.1 * (i + 1) + 0.01 * number
            write(tmp_path, f"{number}/{i}", pruned("../../sparse/last.ckpt", ratio, min_channels=number + 2))
    curves = sweep_curves(outcomes(collect(tmp_path).runs))
    assert [name.split()[-1] for name in curves] == [
        "4",
        "2",
        "3",
    ]  # 5, 4 and 3 ratios; of the latter the more accurate
    assert len(curves) == len(comparisons.SETTINGS)


def test_there_is_no_trade_off_without_a_pruning(tmp_path):
    write(tmp_path, "sparse", trained("sparse"))
    assert tradeoff_panels(outcomes(collect(tmp_path).runs)) == {}


def many(folder):
    """Runs of every kind, whose names do not say in which order they come."""
    write(folder, "9", trained("baseline", sparsity=0.0))
    write(folder, "8", trained("sparse", sparsity=1e-3))
    write(folder, "7", trained("sparse", sparsity=2e-4))
    write(folder, "6", pruned("../7/last.ckpt", 0.5))
    write(folder, "5", pruned("../7/last.ckpt", 0.3, max_layer_ratio=0.9))
    write(folder, "4", pruned("../8/last.ckpt", 0.3))
    write(folder, "3", tuned("../6/pruned.ckpt", "scratch"))
    write(folder, "2", tuned("../6/pruned.ckpt"))
    write(folder, "1", trained("sparse", sparsity=2e-4, parent="../2/last.ckpt"))
    write(folder, "0", pruned("../1/last.ckpt", 0.5))
    return collect(folder).runs


ORDER = [
    ("baseline", "3 epochs"),
    ("sparse", "lambda 0.0002, 3 epochs"),
    ("sparse", "lambda 0.001, 3 epochs"),
    ("pruned, ratio 0.5: before calibration", "lambda 0.0002, 3 epochs"),
    ("pruned, ratio 0.5: calibrated", "lambda 0.0002, 3 epochs"),
    ("pruned, ratio 0.5: fine-tuned, 3 epochs", "lambda 0.0002, 3 epochs"),
    ("pruned, ratio 0.5: from scratch, 3 epochs", "lambda 0.0002, 3 epochs"),
    ("pruned, ratio 0.5: trained again, 3 epochs", "lambda 0.0002, 3 epochs"),
    ("pruned, ratio 0.3: before calibration", "lambda 0.001, 3 epochs"),
    ("pruned, ratio 0.3: calibrated", "lambda 0.001, 3 epochs"),
    ("pruned, ratio 0.3: before calibration", "lambda 0.0002, 3 epochs, max_layer_ratio 0.9"),
    ("pruned, ratio 0.3: calibrated", "lambda 0.0002, 3 epochs, max_layer_ratio 0.9"),
    ("pruned, ratio 0.5: before calibration", "lambda 0.0002, 3 epochs, pass 2"),
    ("pruned, ratio 0.5: calibrated", "lambda 0.0002, 3 epochs, pass 2"),
]


def test_order_of_the_rows(tmp_path):
    runs = many(tmp_path)
    for shuffled in (runs, runs[::-1], random.Random(1).sample(runs, len(runs))):
        assert [(words.network(o), words.setting(o.first)) for o in outcomes(shuffled)] == ORDER


def test_the_order_of_the_rows_does_not_come_from_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(Kind, "label", property(lambda kind: f"calibrated {9 - kind}"))
    made = outcomes(many(tmp_path))
    assert [o.kind for o in made[3:8]] == [kind for kind in Kind if kind >= 2 and kind is not Kind.REPAIRED]


def test_counts_of_plans_of_any_age():
    now, before = {"plan": {"restored": 3, "dead": 0}}, {"plan": {"put_back": 3, "followed": 0}}
    for result in (now, before):
        assert (plan_count(result, "restored"), plan_count(result, "dead")) == (3, 0)
    assert plan_count({}, "restored") is None and plan_count({"plan": None}, "dead") is None


def test_a_run_that_is_there_twice_counts_once(tmp_path):
    for name in ("a", "copy"):
        write(tmp_path, name, trained("sparse"))
    (outcome,) = outcomes(collect(tmp_path).runs)
    assert isinstance(outcome, Outcome) and len(outcome.runs) == 1


def test_a_repaired_pruning_stands_beside_the_calibrated_one(tmp_path):
    write(tmp_path, "0", trained("sparse"))
    write(tmp_path, "1", pruned("../0/last.ckpt", 0.5))
    repair = {"repair": {"images": 2000, "ridge": 1e-3}, "calibrate": {"batches": 0}}
    write(tmp_path, "2", pruned("../0/last.ckpt", 0.5, **repair))
    made = [o for o in outcomes(collect(tmp_path).runs) if o.kind in (Kind.CALIBRATED, Kind.REPAIRED)]
    assert [(words.network(o), words.setting(o.first), o.accuracies) for o in made] == [
        ("pruned, ratio 0.5: calibrated", "lambda 0.0001, 3 epochs", [0.75]),
        ("pruned, ratio 0.5: repaired", "lambda 0.0001, 3 epochs, repaired", [0.75]),
    ]


def test_a_baseline_is_that_of_every_penalty(tmp_path):
    def run(name, sparsity, **config):
        role = "sparse" if sparsity else "baseline"
        write(tmp_path, name, trained(role, config={"sparsity": sparsity, "trainer": {"max_epochs": 3}} | config))

    run("baseline", 0.0, penalty={"layers": None})  # of a version that knew no other penalty
    run("l1", 1e-4, penalty={"name": "l1", "layers": None, "t": None})
    run("l1 before", 1e-4, penalty={"layers": None})
    run("polar", 1e-4, penalty={"name": "polarization", "layers": None, "t": 1.2})
    runs = {r.folder.name: r for r in collect(tmp_path).runs}
    assert len({json.dumps(r.recipe) for r in runs.values()}) == 1
    assert runs["l1"].identity == runs["l1 before"].identity != runs["polar"].identity
    assert {name: r.penalty for name, r in runs.items()} == {
        "baseline": "l1",
        "l1": "l1",
        "l1 before": "l1",
        "polar": "polarization t 1.2",
    }
