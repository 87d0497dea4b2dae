"""A latency budget: the knapsack against brute force, and the correction against tables that are wrong. Nothing is timed."""

import itertools

import pytest
import torch
from test_criteria import IMAGE, chain
from torch import nn

import slimming
from slimming import models
from slimming.channels import knapsack
from slimming.channels.graph.deciding import Settling, make_choice
from slimming.channels.knapsack import Knapsack, LayerTimes
from slimming.channels.latency import ACCEPTED, TOLERANCE, Latency
from slimming.channels.options import PlanOptions
from slimming.errors import ConfigError, GraphError
from slimming.stages.restoring import left_in_training, planned_first


def gammas(seed, *widths):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(width, generator=generator).tolist() for width in widths]


def linear(ins, outs, each=1.0, fixed=0.0):
    """A table of times that are `fixed` and `each` for every pair of an input and an output."""
    return LayerTimes([1, ins], [1, outs], [[fixed + each * i * o for o in (1, outs)] for i in (1, ins)])


def tables(model, each=None):
    """Return a table for every convolution of a network; its time follows its MACs."""
    convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    return {n: linear(m.in_channels, m.out_channels, (each or {}).get(n, 1.0)) for n, m in convs.items()}


def seconds(model, each=None):
    """Return the time of a whole network, which `tables` says exactly."""
    convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    return sum((each or {}).get(n, 1.0) * m.in_channels * m.out_channels for n, m in convs.items())


def whole(model, distort=lambda share: share, each=None):
    """Return what measures the share of a plan's network, distorted."""
    return lambda plan: distort(seconds(slimming.prune(model, plan), each) / seconds(model, each))


def parts(model, step=1, **options):
    """Return the choice, what settles it, and the scores of a network."""
    graph = slimming.trace(model, IMAGE)
    free, values = graph.candidates("apart"), graph.scores("gamma")
    choice = make_choice(graph, free, torch.arange(graph.count), values, "max")
    return choice, Settling(graph, values, choice, PlanOptions(round_to=step, **options))


# --- the table --------------------------------------------------------------------------------------------------------


def test_times_are_linear_between_and_beyond_what_was_measured():
    table = linear(4, 10, 2.0, fixed=3.0)
    for ins, outs in itertools.product((1, 2.5, 4, 8), (1, 3, 10, 12)):
        assert table(ins, outs) == pytest.approx(3 + 2 * ins * outs)


def test_a_width_of_which_there_is_one_does_not_matter():
    table = LayerTimes([3], [16, 32], [[1.0, 2.0]])
    assert table(1, 32) == table(3, 32) == 2.0 and table(3, 24) == 1.5


def test_a_width_between_the_blocks_costs_its_factor_and_the_whole_one_does_not():
    table = LayerTimes([16, 56], [16, 64], [[1.0, 1.0], [1.0, 1.0]], (1.5, 1.25))
    assert (table(24, 64), table(32, 24), table(24, 24), table(56, 64)) == (1.5, 1.25, 1.875, 1.0)


def test_tables_are_written_and_read():
    shared = linear(4, 10)
    times = {"a": shared, "b": linear(2, 3), "c": shared}
    found = knapsack.record(times)
    assert len(found["tables"]) == 2 and knapsack.read(found) == times


@pytest.mark.parametrize(
    "change",
    [{"ins": []}, {"ins": [4, 1]}, {"ms": [[1.0]]}, {"ms": [["a", "b"], [1, 2]]}, {"odd": [1]}, {"outs": None}],
)
def test_damaged_tables_are_refused(change):
    found = knapsack.record({"a": linear(4, 10)})
    found["tables"][0] |= change
    with pytest.raises((ValueError, TypeError, KeyError)):
        knapsack.read(found)


# --- the knapsack -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("step", [1, 2])
def test_no_choice_as_fast_keeps_more(step, additive):
    """Where the times of layers do not depend on each other, every choice of the path is the best of all for its time."""
    model = chain(*gammas(0, 6, 4, 6))
    each = {"0": 1.0, "3": 4.0, "6": 2.0}
    times = {n: LayerTimes([1], [1, 8], [[cost, 8 * cost]]) for n, cost in each.items()}
    choice, settling = parts(model, step)
    sack = Knapsack(choice, settling, times, step, additive)

    def lost(removed):
        if additive:
            return float(choice.score[removed].sum())
        squares = choice.score.square()
        whole, left = (squares.new_zeros(3).index_add_(0, choice.layer, e) for e in (squares, squares * ~removed))
        return float(((whole - left) * whole / left).sum())

    def time(removed):
        kept = [int((~removed[choice.layer == layer]).sum()) for layer in range(3)]
        return sum(cost * count for cost, count in zip(each.values(), kept, strict=True))

    every = []
    for counts in itertools.product(*(column.levels for column in sack.columns)):
        removed = torch.zeros(len(choice.score), dtype=torch.bool)
        for column, count in zip(sack.columns, counts, strict=True):
            removed[column.units[:count]] = True
        every.append((time(removed), lost(removed)))
    sack.pick(0.0)
    assert len(sack.path) == 1 + sum(len(column.levels) - 1 for column in sack.columns), "one move for every step"
    for *_, total in sack.path:
        removed = sack.pick(total / sack.dense_ms).removed
        assert time(removed) == pytest.approx(total)
        assert lost(removed) == pytest.approx(min(loss for other, loss in every if other <= total + 1e-9))


def test_a_step_that_saves_nothing_alone_is_looked_beyond():
    model = chain([0.1 + 0.01 * n for n in range(32)])
    stairs = LayerTimes([3], [8, 16, 24, 32], [[1.0, 1.0, 2.0, 2.0]])  # 24 channels are as slow as 32
    choice, settling = parts(model, 8)
    picked = Knapsack(choice, settling, {"0": stairs}, 8).pick(0.5)
    assert int((~picked.removed).sum()) == 16 and picked.share == 0.5


def test_units_go_together_where_their_channels_are_tied():
    model = models.build("preresnet", depth=20, num_classes=10, in_channels=3)
    graph = slimming.trace(model, IMAGE)
    times = tables(model)
    plan = graph.plan(Latency(0.6, times, whole(model)), round_to=8)
    for name, kept in plan.keep.items():
        assert len(kept) % 8 == 0 or len(kept) == graph.norms[name].module.num_features


def test_a_layer_whose_channels_are_dear_is_not_emptied():
    """Scores alike in all layers, one a hundred times as slow: additive ones take it down to the least, the others do not."""
    model = chain([1.0] * 64, [1.0] * 64)
    choice, settling = parts(model, 8)
    times = {"0": LayerTimes([1], [8, 64], [[8.0, 64.0]]), "3": LayerTimes([1], [8, 64], [[24.0, 192.0]])}
    widths = {}
    for additive in (False, True):
        removed = Knapsack(choice, settling, times, 8, additive).pick(88 / 256).removed
        widths[additive] = [int((~removed[choice.layer == layer]).sum()) for layer in range(2)]
    assert widths[True] == [64, 8] and widths[False][1] >= 16


def test_what_takes_no_time_stays():
    model = chain([0.01] * 16, [1.0] * 16)
    choice, settling = parts(model, 8)
    picked = Knapsack(choice, settling, {"3": LayerTimes([1], [8, 16], [[1.0, 2.0]])}, 8).pick(0.5)
    assert picked.removed.tolist() == [False] * 16 + [True] * 8 + [False] * 8


# --- the correction ---------------------------------------------------------------------------------------------------

WRONG = {
    "exact": lambda s: s,
    "a third takes time that the table does not see": lambda s: 0.35 + 0.65 * s,
    "the network is faster than its layers": lambda s: s**1.5,
    "the last channels count most": lambda s: s**0.5,
    "a cliff": lambda s: s if s > 0.8 else 0.9 * s,
    "stairs": lambda s: round(s * 40) / 40,
}


@pytest.mark.parametrize("distort", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("share", [0.7, 0.5])
def test_the_correction_meets_what_is_asked_whatever_the_table_says(share, distort):
    model = chain(*gammas(1, 48, 64, 64, 96))
    measured = []
    plan_time = whole(model, distort)

    def measure(plan):
        measured.append(plan_time(plan))
        return measured[-1]

    criterion = Latency(share, tables(model), measure)
    plan = slimming.trace(model, IMAGE).plan(criterion, round_to=8)
    assert plan_time(plan) == pytest.approx(share, rel=ACCEPTED)
    assert len(measured) <= 6, f"a handful of networks, not {measured}"
    assert plan.asked == {"criterion": "Latency", "latency": share}


def test_a_thinner_network_that_is_no_faster_is_not_the_end():
    """Engines choose other algorithms at some widths."""
    model = chain(*gammas(1, 48, 64, 64, 96))

    def stalling(share):
        return 0.56 + 0.1 * (0.5 - share) if share > 0.4 else share + 0.1

    plan = slimming.trace(model, IMAGE).plan(Latency(0.5, tables(model), whole(model, stalling)))
    assert whole(model, stalling)(plan) == pytest.approx(0.5, rel=TOLERANCE)


@pytest.mark.parametrize("seed", range(10))
def test_the_correction_converges_with_noise(seed):
    model = chain(*gammas(2, 48, 64, 64, 96))
    generator = torch.Generator().manual_seed(seed)
    plan_time = whole(model, lambda s: 0.2 + 0.8 * s)

    def measure(plan):
        return plan_time(plan) * (1 + 0.01 * float(torch.randn(1, generator=generator).clamp(-2, 2)))

    plan = slimming.trace(model, IMAGE).plan(Latency(0.5, tables(model), measure), round_to=8)
    assert plan_time(plan) == pytest.approx(0.5, rel=TOLERANCE + 0.02)


def test_a_table_that_blames_the_wrong_layers_is_corrected():
    model = chain(*gammas(3, 48, 64, 64, 96))
    true, believed = {"0": 30.0, "9": 0.2}, {"0": 0.1, "9": 3.0}
    plan_time = whole(model, each=true)
    plan = slimming.trace(model, IMAGE).plan(Latency(0.6, tables(model, believed), plan_time), round_to=8)
    assert plan_time(plan) == pytest.approx(0.6, rel=ACCEPTED)


def test_what_cannot_be_reached_is_refused_with_the_best():
    model = chain(*gammas(4, 32, 32))
    with pytest.raises(
        GraphError, match=r"budget.latency=0.1 cannot be reached: .* 0\.4\d\d of the dense latency remain"
    ):
        slimming.trace(model, IMAGE).plan(
            Latency(0.1, tables(model), whole(model, lambda s: 0.4 + 0.6 * s)), round_to=8
        )


def test_a_goal_between_two_steps_is_refused_with_the_nearest():
    model = chain([0.5] * 8 + [1.0] * 8)
    with pytest.raises(
        GraphError, match=r"budget.latency=0.7 is not met: the nearest of \d measured networks takes 0.5"
    ):
        slimming.trace(model, IMAGE).plan(Latency(0.7, tables(model), whole(model)), round_to=8)


def test_what_the_constraints_keep_stays():
    model = chain(*gammas(5, 32, 64))
    plan = slimming.trace(model, IMAGE).plan(
        Latency(0.78, tables(model), whole(model)), round_to=8, min_channels=24, ignore=["4"]
    )
    assert {name: len(kept) for name, kept in plan.keep.items()} == {"1": 24}


@pytest.mark.parametrize("share", [0, 1, 1.5, "half"])
def test_shares_that_are_none(share):
    with pytest.raises(ConfigError, match=r"budget.latency must be"):
        Latency(share, {}, lambda plan: 1.0)


@pytest.mark.parametrize("share", [0.9, 0.75, 0.6, 0.55, 0.5, 0.4])
def test_the_time_of_a_choice_is_that_of_its_network(share):
    """Whatever was picked before, and where the path jumps over a share as well."""
    model = chain(*gammas(1, 48, 64, 64, 96))
    choice, settling = parts(model, 8)
    sack = Knapsack(choice, settling, tables(model), 8)
    sack.pick(0.3)
    picked = sack.pick(share)
    graph = settling.graph
    plan = graph._write_plan(graph, settling.outcome(picked.removed), choice, picked.removed, {})
    assert whole(model)(plan) == pytest.approx(picked.share) and picked.share == pytest.approx(share, abs=0.015)


@pytest.mark.parametrize("share", [0.95, 0.4])
def test_what_has_left_in_training_is_gone_from_all_that_is_measured(share):
    """The plan that comes of it was measured, also where more has left than the time asks for."""
    model = chain(*gammas(5, 48, 64))
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.zeros_(norm.weight[:20])
        torch.nn.init.zeros_(norm.bias[:20])
    graph, measured, time = slimming.trace(model, IMAGE), [], whole(model)

    def measure(plan):
        measured.append(plan.keep)
        return time(plan)

    given = {"ties": "together", "ignore": [], "score": "gamma", "round_to": 8}
    left = left_in_training(graph)
    asked = Latency(share, tables(model), measure, tolerance=0.04)
    if share > 0.9:  # what has left takes more
        with pytest.raises(GraphError, match="is not met"):
            planned_first(graph, asked, graph.scores("gamma"), left, given)
    else:
        plan = planned_first(graph, asked, graph.scores("gamma"), left, given)
        assert plan.keep in measured
    rounded = [sum(channel < 20 for channel in kept) for keep in measured for kept in keep.values()]
    assert rounded and max(rounded) < 8
