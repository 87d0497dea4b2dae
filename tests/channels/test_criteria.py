"""Criteria, constraints and scores, on closed forms."""

import json
import re

import pytest
import torch
from exactness import assert_exact, randomise
from torch import nn

import slimming
from slimming import models
from slimming.channels.layers import SelectBatchNorm
from slimming.errors import ConfigError, GraphError, PlanError, SlimmingError

IMAGE = torch.randn(1, 3, 32, 32)


def chain(*gammas):
    """conv-BN-ReLU per list of gammas, then a linear head."""
    layers, c_in = [], 3
    for values in gammas:
        norm = nn.BatchNorm2d(len(values))
        with torch.no_grad():
            norm.weight.copy_(torch.tensor(values))
        layers += [nn.Conv2d(c_in, len(values), 3, padding=1, bias=False), norm, nn.ReLU()]
        c_in = len(values)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, 2))


def kept(model, criterion, **options):
    plan = slimming.trace(model, IMAGE).plan(criterion, **options)
    norms = {n: m.num_features for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    return [plan.keep.get(n, list(range(c))) for n, c in norms.items()], plan


A, B = [0.5, -0.1, 0.3, 0.2], [0.05, 0.6, -0.7, 0.4, 0.15, 0.8]


def test_global_ratio_removes_exactly_the_weakest():
    keep, plan = kept(chain(A, B), slimming.GlobalRatio(0.4))
    assert keep == [[0, 2], [1, 2, 3, 5]]  # 0.05, 0.1, 0.15, 0.2 of ten
    assert (plan.got["removed"], plan.got["candidates"], plan.got["restored"]) == (4, 10, 0)
    assert plan.asked == {"criterion": "GlobalRatio", "ratio": 0.4, "convention": "exact"}


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.29, 0.3, 0.7])
def test_the_number_removed_is_the_floor(ratio):
    _, plan = kept(chain(A, B), slimming.GlobalRatio(ratio), ties="apart")
    assert plan.got["removed"] + plan.got["restored"] == int(ratio * 10 + 1e-9)


def test_equal_scores_go_in_order():
    assert kept(chain([1.0] * 4, [1.0] * 4), slimming.GlobalRatio(0.25))[0] == [[2, 3], [0, 1, 2, 3]]


def test_what_is_ignored_must_be_there():
    model = nn.Sequential(chain(A, B, A), nn.BatchNorm1d(2, affine=False))
    whole = [[0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    assert kept(model, slimming.GlobalRatio(0.5), ignore=["0.[14]", "1"])[0][:2] == whole  # 1 has no scales
    for wrong in (["0.0"], ["0.1", "layer1.*"]):
        words = f"ignore: '{re.escape(wrong[-1])}' matches no BatchNorm; there are 0.1, "
        with pytest.raises(ConfigError, match=words):
            kept(model, slimming.GlobalRatio(0.5), ignore=wrong)


def test_the_reference_convention():
    torch.manual_seed(0)
    model = models.vgg(19)
    graph = slimming.trace(randomise(model).float(), IMAGE)
    plan = graph.plan(slimming.GlobalRatio(0.7, convention="reference"))
    scores = torch.cat([m.weight.detach().abs() for m in model.modules() if isinstance(m, nn.BatchNorm2d)])
    assert int((scores > scores.sort().values[int(5504 * 0.7)]).sum()) == 1651 == 5504 - plan.got["removed"]


def test_together_a_class_counts_with_all_its_gammas():
    model = randomise(models.torchvision("resnet18"))
    example = IMAGE.double()
    graph = slimming.trace(model, example)
    for ratio in (0.1, 0.37, 0.8):
        plan = graph.plan(slimming.GlobalRatio(ratio))
        overshoot = plan.got["removed"] - int(ratio * plan.got["candidates"] + 1e-9)
        assert 0 <= overshoot < 5  # the first stream is written by the stem and two blocks, others by three


def test_per_layer_threshold_and_optimal():
    model = chain(A, B)
    assert kept(model, slimming.PerLayerRatio(0.5))[0] == [[0, 2], [1, 2, 5]]
    assert kept(model, slimming.Threshold(0.21))[0] == [[0, 2], [1, 2, 3, 5]]
    assert kept(model, slimming.Threshold(0.0))[0] == [[0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    # squares of A: .01 .04 .09 .25 of .39; of B: .0025 .0225 .16 ... of 1.7150
    assert kept(model, slimming.OptimalThreshold(0.05))[0] == [[0, 2, 3], [1, 2, 3, 5]]


@pytest.mark.parametrize("key", ["macs", "params"])
@pytest.mark.parametrize("ties", ["together", "apart", "aligned"])
def test_a_budget_gives_the_largest_network_within_it(key, ties):
    model = randomise(models.preresnet(20, width=0.5))
    example = IMAGE.double()
    graph = slimming.trace(model, example)
    dense = slimming.cost(model, example)
    for share in (0.8, 0.3):
        plan = graph.plan(slimming.Budget(**{key: share}), ties=ties)
        thin = slimming.cost(slimming.prune(model, plan), example)
        ratio = thin.macs / dense.macs if key == "macs" else thin.num_params / dense.num_params
        assert ratio <= share and ratio == pytest.approx(plan.got[key])
        fewer = graph.plan(
            slimming.GlobalRatio((plan.got["removed"] + plan.got["restored"] - 1) / graph.count), ties=ties
        )
        if ties == "apart":
            assert fewer.got[key] > share, "putting the last one back would exceed the budget"


def test_a_budget_out_of_reach_names_the_best():
    with pytest.raises(GraphError, match=r"budget.macs=1e-06 cannot be reached.* 0\.\d+ of the dense macs remain"):
        kept(chain(A, B), slimming.Budget(macs=1e-6))


def test_constraints_restore_and_take_nothing_else():
    model = chain(A, B)
    keep, plan = kept(model, slimming.GlobalRatio(0.9), min_channels=2)
    assert keep == [[0, 2], [2, 5]]
    assert (plan.got["removed"], plan.got["restored"]) == (6, 3)
    assert kept(model, slimming.GlobalRatio(0.9), max_layer_ratio=0.5)[0] == [[0, 2], [1, 2, 5]]
    assert kept(model, slimming.GlobalRatio(0.9), round_to=4)[0] == [[0, 1, 2, 3], [1, 2, 3, 5]]
    assert kept(model, slimming.GlobalRatio(0.9), ignore=["1"])[0][0] == [0, 1, 2, 3]


def test_no_layer_empties():
    keep, plan = kept(chain([0.1, 0.2], [5.0, 6.0]), slimming.GlobalRatio(0.5))
    assert keep == [[1], [0, 1]] and plan.got["restored"] == 1


def test_scores():
    model = chain(A, B)
    seeds = [kept(model, slimming.GlobalRatio(0.5), score="random", seed=s)[0] for s in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]
    with torch.no_grad():
        model[0].weight.fill_(1.0)[1].fill_(0.1)
        model[3].weight.fill_(5.0)
    assert kept(model, slimming.GlobalRatio(0.1), score="weight_l1")[0] == [[0, 2, 3], [0, 1, 2, 3, 4, 5]]


def test_the_score_of_a_class_is_the_largest_the_mean_or_the_sum():
    model = randomise(models.torchvision("resnet18"))
    graph = slimming.trace(model, IMAGE.double())
    keeps = [graph.plan(slimming.GlobalRatio(0.5), reduce=r).keep for r in ("max", "mean", "sum")]
    assert keeps[0] != keeps[1] != keeps[2] != keeps[0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: slimming.GlobalRatio(1.0), r"ratio must be a number >= 0 and < 1"),
        (lambda: slimming.GlobalRatio(-0.1), "ratio must be a number >= 0 and < 1, got -0.1"),
        (lambda: slimming.GlobalRatio("half"), "got 'half'"),
        (lambda: slimming.GlobalRatio(0.5, convention="other"), "convention must be one of"),
        (lambda: slimming.PerLayerRatio(float("nan")), "got nan"),
        (lambda: slimming.Threshold(-1), "threshold .* got -1"),
        (lambda: slimming.OptimalThreshold(2), "delta .* got 2"),
        (lambda: slimming.Budget(), "exactly one of macs and params"),
        (lambda: slimming.Budget(macs=0.5, params=0.5), "exactly one"),
        (lambda: slimming.Budget(macs=1.5), "budget.macs .* got 1.5"),
        (lambda: kept(chain(A), slimming.GlobalRatio(0.5), ties="loose"), "ties must be one of"),
        (lambda: kept(chain(A), slimming.GlobalRatio(0.5), min_channels=0), "min_channels .* got 0"),
        (lambda: kept(chain(A), slimming.GlobalRatio(0.5), max_layer_ratio=0), "max_layer_ratio .* got 0"),
        (lambda: kept(chain(A), slimming.GlobalRatio(0.5), round_to=1.5), "round_to .* got 1.5"),
        (lambda: kept(chain(A), slimming.GlobalRatio(0.5), score="l7"), "score must be one of"),
    ],
)
def test_bad_values(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        from torchvision.ops import FrozenBatchNorm2d

        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)))


def _untrained():
    model = chain(A)
    model[1].weight.requires_grad_(False)
    return model


def _infinite():
    model = chain(A)
    nn.init.constant_(model[1].weight, float("inf"))
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Conv2d(3, 4, 3), "no BatchNorm scales to choose by: insert nn.BatchNorm2d"),
        (Frozen, "FrozenBatchNorm layers .* have scales that do not train"),
        (_untrained, "requires_grad=False"),
        (_infinite, "scales of 1 are not finite"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "no BatchNorm scale can go"),
        (lambda: nn.Conv2d(5, 4, 3), "fails on the example input: RuntimeError"),
        (lambda: chain(A).to("meta"), "example input is on cpu, the network on meta"),
    ],
)
def test_networks_that_cannot_be_pruned(make, words):
    with pytest.raises(GraphError, match=words):
        slimming.trace(make(), IMAGE).plan(slimming.GlobalRatio(0.5))


def test_an_example_without_tensors():
    with pytest.raises(GraphError, match="holds no tensor"):
        slimming.trace(chain(A), "image")


# --- plans ------------------------------------------------------------------------------------------------------------


def plan_of(model):
    return slimming.trace(model, IMAGE).plan(slimming.GlobalRatio(0.4))


def test_a_plan_survives_json():
    model = chain(A, B)
    plan = plan_of(model)
    again = slimming.PruningPlan.from_json(plan.to_json())
    assert again == plan
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(slimming.prune(model, plan).eval()(x), slimming.prune(model, again).eval()(x))
    assert all(word in plan.describe() for word in ("4 of 10 gammas", "conv", "4 -> 2"))


def test_a_plan_for_another_network_is_refused():
    plan = plan_of(chain(A, B))
    for act in (slimming.prune, slimming.mask):
        with pytest.raises(PlanError, match=r"for Sequential with [\d,]+ parameters, this network is Sequential with"):
            act(chain(A, A), plan)


def _change(path, value):
    def change(data):
        *parents, last = path
        for key in parents:
            data = data[key]
        if value is None:
            del data[last]
        else:
            data[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _change(["layers", "0", "outs"], [0, 0]),
        _change(["layers", "0", "outs"], [2, 0]),
        _change(["layers", "0", "outs"], [-1, 2]),
        _change(["layers", "0", "outs"], [0, 4]),
        _change(["layers", "0", "outs"], list(range(10**5))),
        _change(["layers", "0", "outs"], []),
        _change(["layers", "0", "outs"], [0, 1.5]),
        _change(["layers", "0", "outs"], [0, True]),
        _change(["layers", "0", "outs"], "all"),
        _change(["layers", "0", "kind"], "system"),
        _change(["layers", "0", "size"], None),
        _change(["keep", "1"], [1]),
        _change(["keep", "9"], [1]),
        _change(["format"], 7),
        _change(["layers"], None),
        _change(["layers"], [1]),
    ],
)
def test_a_plan_that_cannot_be_is_refused(change):
    data = json.loads(plan_of(chain(A, B)).to_json())
    change(data)
    with pytest.raises(PlanError, match="plan: "):
        slimming.PruningPlan.from_dict(data)


def test_text_that_is_no_plan():
    for text in ("{", "[1]", "{}"):
        with pytest.raises(PlanError):
            slimming.PruningPlan.from_json(text)


def test_a_plan_with_a_size_of_another_layer_is_refused():
    model = chain(A, B)
    plan = plan_of(model)
    plan.layers["0"].size = (3, 9)
    with pytest.raises(SlimmingError, match="layer 0"):
        slimming.prune(model, plan)


def test_prune_proves_itself(monkeypatch):
    model = chain(A, B)
    plan = plan_of(model)
    plan.layers["3"].ins = [0, 1]  # not the channels that stay before it
    with pytest.raises(PlanError, match="differs from the masked one"):
        slimming.prune(model, plan)
    assert slimming.prune(model, plan, verify=False) is not model


# --- calibration ------------------------------------------------------------------------------------------------------


def test_calibration_is_the_average_over_the_batches():
    model = chain(A)
    batches = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    calibrated = slimming.calibrate(model, batches)
    outputs = [model[0](b) for b in batches]
    mean = torch.stack([o.mean((0, 2, 3)) for o in outputs]).mean(0)
    torch.testing.assert_close(calibrated[1].running_mean, mean)
    var = torch.stack([o.var((0, 2, 3)) for o in outputs]).mean(0)
    torch.testing.assert_close(calibrated[1].running_var, var)
    assert not calibrated.training and calibrated[1].momentum == 0.1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(GraphError, match="at least one batch"):
        slimming.calibrate(model, [])


def test_calibration_restores_what_pruning_shifted():
    """A pruned channel took a constant with it; with new statistics the network sees the distribution it knew."""
    torch.manual_seed(0)
    model = chain([1.0] * 8 + [1e-6] * 8, [1.0] * 8)
    with torch.no_grad():
        model[1].bias[8:] = 2.0
    batches = [torch.randn(32, 3, 8, 8) for _ in range(4)]
    model = slimming.calibrate(model, batches)
    plan = slimming.trace(model, batches[0]).plan(slimming.Threshold(1e-3))
    pruned = slimming.prune(model, plan)
    again = slimming.calibrate(pruned, batches)
    with torch.no_grad():
        expected = model(batches[0])
        errors = [float((m.eval()(batches[0]) - expected).abs().max()) for m in (pruned, again)]
    assert errors[1] < 0.2 * errors[0]


def test_selecting_layers_keep_their_indices_when_trained_and_copied():
    model = randomise(models.preresnet(20, width=0.5))
    example = IMAGE.double()
    thin = assert_exact(model, slimming.trace(model, example).plan(slimming.GlobalRatio(0.5)), example)
    import copy

    assert torch.equal(copy.deepcopy(thin).eval()(example), thin.eval()(example))
    assert any(isinstance(m, SelectBatchNorm) and m.select is not None for m in thin.modules())
