"""ties=aligned: a channel leaves every tensor that it lives in or none, by hand and on networks of all kinds."""

import copy

import pytest
import torch
from exactness import NORM, assert_exact, empty_sides, randomise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_operators import conv_bn, net
from test_random_nets import Net, program
from test_zoo import HUGE
from test_zoo import NAMES as ZOO
from test_zoo import build as build_zoo
from torch import nn
from torch.nn import functional as F
from torchvision import models as zoo

import slimming
from slimming import models
from slimming.channels.embedding import selecting
from slimming.errors import ConfigError, GraphError, PlanError

IMAGE = torch.randn(1, 3, 8, 8, dtype=torch.float64)
LARGER = torch.randn(1, 3, 32, 32, dtype=torch.float64)


def aligned(graph, ratio, **options):
    return graph.plan(slimming.GlobalRatio(ratio), ties="aligned", **options)


def set_gammas(model, gammas):
    with torch.no_grad():
        for name, values in gammas.items():
            model.get_submodule(name).weight.copy_(torch.tensor(values))
    return model


# --- by hand ------------------------------------------------------------------------------------------------------------


def preactivated():
    """A pre-activation block of 4 channels; a convolution reads its stream raw, a BatchNorm reads it twice."""

    def forward(self, x):
        x = self.stem(x)
        x = x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return self.fc((self.down(x) + self.up(F.relu(self.bn3(x)))).mean((2, 3)))

    convs = {"stem": nn.Conv2d(3, 4, 3), "conv1": nn.Conv2d(4, 4, 1), "conv2": nn.Conv2d(4, 4, 1, bias=False)}
    convs |= {"down": nn.Conv2d(4, 6, 1, bias=False), "up": nn.Conv2d(4, 6, 1), "fc": nn.Linear(6, 2)}
    return randomise(net({**convs, **{f"bn{i}": nn.BatchNorm2d(4) for i in (1, 2, 3)}}, forward))


GAMMAS = {"bn1": [0.1, 0.5, 0.2, 0.9], "bn3": [0.7, 0.1, 0.1, 0.9], "bn2": [0.3, 0.05, 0.35, 0.8]}
# of bn1 and bn3, which read the stream, the mean is 0.4 0.3 0.15 0.9, the maximum 0.7 0.5 0.2 0.9, the sum twice the mean


@pytest.mark.parametrize(
    ("reduce", "ratio", "stream", "inner"),
    [
        (None, 1 / 12, {0, 1, 2, 3}, {0, 2, 3}),
        ("mean", 3 / 12, {0, 1, 3}, {0, 2, 3}),
        ("mean", 5 / 12, {0, 3}, {0, 2, 3}),  # 0.3 twice: the layer that runs first goes first
        ("mean", 6 / 12, {0, 3}, {2, 3}),
        ("max", 5 / 12, {0, 1, 3}, {3}),
        ("sum", 5 / 12, {0, 1, 3}, {3}),
        ("sum", 6 / 12, {0, 3}, {3}),
    ],
)
def test_the_score_of_a_class_is_that_of_its_gammas_and_each_counts(reduce, ratio, stream, inner):
    model = set_gammas(preactivated(), GAMMAS)
    graph = slimming.trace(model, IMAGE, strict=True)
    plan = aligned(graph, ratio, **({"reduce": reduce} if reduce else {}))
    found = {n: set(plan.keep.get(n, range(4))) for n in GAMMAS}
    assert found == {"bn1": stream, "bn3": stream, "bn2": inner}
    assert plan.got["candidates"] == 12 and plan.got["removed"] == 12 - 2 * len(stream) - len(inner)
    assert_exact(model, plan, IMAGE)


def test_the_mask_zeroes_the_filters_that_no_batchnorm_follows_and_no_others():
    model = set_gammas(preactivated(), GAMMAS)
    plan = aligned(slimming.trace(model, IMAGE), 3 / 12)
    assert plan.zeroed == {"stem": [2], "conv2": [2]}  # conv1 is behind bn2; the others write no channel that goes
    masked, changed = slimming.mask(model, plan), {"bn1": {2}, "bn3": {2}, "bn2": {1}, "stem": {2}, "conv2": {2}}
    for name, before in model.named_parameters():
        layer, after = name.rpartition(".")[0], masked.get_parameter(name)
        gone = torch.tensor([i in changed.get(layer, ()) for i in range(len(before))])
        assert not after[gone].any() and torch.equal(after[~gone], before[~gone]), name
    assert plan.describe().count("filters go that no BatchNorm follows") == 2 and "'ties': 'aligned'" in plan.describe()


def test_where_batchnorms_alone_read_a_stream_no_filter_is_zeroed():
    model = randomise(models.densenet(22, growth=6))
    plan = aligned(slimming.trace(model, LARGER), 0.5)
    assert plan.zeroed == {} and not selecting(assert_exact(model, plan, LARGER))


def test_readers_without_a_batchnorm_add_no_score():
    model = set_gammas(preactivated(), GAMMAS)
    before = aligned(slimming.trace(model, IMAGE), 0.5).keep
    with torch.no_grad():
        for layer in (model.down, model.stem, model.conv2):
            layer.weight.mul_(100)
    assert aligned(slimming.trace(model, IMAGE), 0.5).keep == before


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "vgg11_bn"])
def test_on_chains_and_post_activation_resnets_aligned_is_together(name):
    """There BatchNorms write the streams and none reads one: the classes are the same, and so is the plan."""
    model = randomise(zoo.get_model(name, weights=None, num_classes=10))
    graph = slimming.trace(model, torch.randn(1, 3, 64, 64, dtype=torch.float64))
    for ratio in (0.3, 0.8):
        plans = [graph.plan(slimming.GlobalRatio(ratio), ties=t, reduce="mean") for t in ("aligned", "together")]
        assert plans[0].layers == plans[1].layers and plans[0].keep == plans[1].keep and plans[0].zeroed == {}
        assert plans[0].got == plans[1].got and plans[0].got["candidates"] == graph.count


def test_on_pre_activation_networks_it_is_not():
    graph = slimming.trace(randomise(models.preresnet(20)), LARGER)
    plans = [graph.plan(slimming.GlobalRatio(0.5), ties=t) for t in ("aligned", "together")]
    assert plans[0].keep["layer1.1.bn1"] == plans[0].keep["layer2.0.bn1"] != plans[1].keep["layer2.0.bn1"]
    assert [any(p.select for p in plan.layers.values()) for plan in plans] == [False, True]


# --- what may not go ----------------------------------------------------------------------------------------------------


def test_a_class_with_a_frozen_channel_or_a_gamma_that_stays_is_no_candidate():
    def forward(self, x):
        x = self.stem(x)
        y = x + self.inner(F.relu(self.norm(x)))
        return y if self.frozen else self.head(y)

    layers = {"stem": nn.Conv2d(3, 8, 1), "norm": nn.BatchNorm2d(8), "inner": conv_bn(8, 8), "head": nn.Conv2d(8, 2, 1)}
    model = randomise(net(layers, forward))
    model.frozen = False
    graph = slimming.trace(model, IMAGE)
    assert graph.candidates("aligned").all() and graph.shares()["aligned"] == 1
    assert not graph.candidates("aligned", ["norm"]).any() and graph.candidates("apart", ["norm"]).sum() == 8
    with pytest.raises(GraphError, match="try ties='apart'"):
        aligned(graph, 0.5, ignore=["norm"])
    model.norm.weight.requires_grad = False
    assert not slimming.trace(model, IMAGE).candidates("aligned").any()
    model.norm.weight.requires_grad, model.frozen = True, True
    graph = slimming.trace(model, IMAGE)
    assert not graph.candidates("aligned").any()
    assert "not aligned, 100.0%: network output" in graph.describe() and "aligned 0.0%" in graph.describe()


def test_a_constant_behind_the_batchnorm_stays_and_a_bias_goes():
    def forward(self, x):
        x = self.a(x) + 1 if self.constant else self.bias(self.a(x))
        return self.head(F.relu(self.b(F.relu(x))))

    depthwise = nn.Conv2d(8, 8, 3, groups=8)  # its bias makes something of a channel of zeros
    model = randomise(
        net({"a": conv_bn(3, 8), "bias": depthwise, "b": conv_bn(8, 6), "head": nn.Conv2d(6, 2, 1)}, forward)
    )
    model.constant = True
    graph = slimming.trace(model, IMAGE)
    assert graph.candidates("aligned").tolist() == [False] * 8 + [True] * 6
    model.constant = False
    graph = slimming.trace(model, IMAGE)
    assert graph.candidates("aligned").all() and graph.candidates("together").sum() == 6
    plan = aligned(graph, 0.5)
    assert [*plan.zeroed] == ["bias"]
    assert_exact(model, plan, IMAGE)


def test_a_gate_that_no_channel_of_its_own_closes_keeps_what_it_opens():
    """A product with one channel is zero where that is; but it stays, so nothing may be built on it."""

    def forward(self, x):
        x = self.bn(self.conv(x))
        gate = self.gate_bn(self.gate(x))  # (N, 1, H, W)
        return self.head(torch.sigmoid(x) * gate)

    layers = {
        "conv": nn.Conv2d(3, 8, 3),
        "bn": nn.BatchNorm2d(8),
        "gate": nn.Conv2d(8, 1, 1),
        "gate_bn": nn.BatchNorm2d(1),
    }
    model = randomise(net({**layers, "head": nn.Conv2d(8, 2, 1)}, forward))
    for ratio in (0.1, 0.6, 0.95):
        try:
            plan = aligned(slimming.trace(model, IMAGE), ratio)
        except GraphError:
            continue
        assert not selecting(assert_exact(model, plan, IMAGE)) and "bn" not in plan.keep


# --- constraints, criteria, scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["preresnet", "densenet"])
@pytest.mark.parametrize("options", [{"min_channels": 5}, {"max_layer_ratio": 0.6}, {"round_to": 4}], ids=str)
def test_constraints_bring_whole_classes_back(name, options):
    model = randomise(models.build(name, depth=20 if name == "preresnet" else 22))
    graph = slimming.trace(model, LARGER)
    plan = aligned(graph, 0.8, **options)
    thin = assert_exact(model, plan, LARGER)
    assert not selecting(thin) and plan.got["restored"] > 0
    for norm_name, norm in graph.norms.items():
        before, after = norm.module.num_features, thin.get_submodule(norm_name).num_features
        assert after >= min(before, options.get("min_channels", 1))
        assert before - after <= options.get("max_layer_ratio", 1.0) * before
        assert after % options.get("round_to", 1) == 0 or after == before


def test_what_a_layer_of_a_densenet_adds_is_rounded_by_itself():
    """Its 12 channels become 8 or stay; the sums of such widths, which BatchNorms read, could not all be multiples of 8."""
    model = randomise(models.densenet(22))
    graph = slimming.trace(model, LARGER)
    plan = aligned(graph, 0.5, round_to=8)
    thin = slimming.prune(model, plan)
    layers = [m for n, m in thin.named_modules() if n.startswith("dense") and isinstance(m, nn.Conv2d)]
    assert {m.out_channels for m in layers} == {8, 12} and thin.conv1.out_channels % 8 == 0
    assert len(graph.aligned.bands()) == 21 and plan.got["restored"] > 0


CRITERIA = [slimming.PerLayerRatio(0.5), slimming.Threshold(0.5), slimming.OptimalThreshold(0.05)]
CRITERIA += [slimming.Budget(macs=0.5), slimming.Budget(params=0.3), slimming.GlobalRatio(0.5, convention="reference")]


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("per", ["channel", "macs"])
def test_every_criterion(criterion, per):
    model = randomise(models.preresnet(20, width=0.5))
    plan = slimming.trace(model, LARGER).plan(criterion, ties="aligned", per=per)
    thin = assert_exact(model, plan, LARGER)
    assert not selecting(thin) and plan.got["removed"] > 0
    macs = slimming.cost(thin, LARGER).macs / slimming.cost(model, LARGER).macs
    assert plan.got["macs"] == pytest.approx(macs)
    if isinstance(criterion, slimming.Budget):
        assert plan.got["macs" if criterion.macs else "params"] <= (criterion.macs or criterion.params)


@pytest.mark.parametrize("score", ["lamp", "reconstruction", "random", "weight_l1", "given"])
def test_every_score(score):
    torch.manual_seed(0)
    images = torch.randn(24, 3, 32, 32, dtype=torch.float64)
    model = slimming.calibrate(randomise(models.preresnet(20, width=0.5)), [images])
    graph = slimming.trace(model, images[:1])
    values = {n: torch.arange(norm.module.num_features) for n, norm in graph.norms.items()}
    plan = aligned(graph, 0.4, score=values if score == "given" else score, batches=[images])
    assert not selecting(assert_exact(model, plan, images[:1])) and 0.35 < plan.got["ratio"] < 0.5
    if score == "given":  # the last channels of every stream are the best
        assert plan.keep["bn"] == list(range(128 - len(plan.keep["bn"]), 128))


def test_repaired_calibrated_and_trained_further():
    torch.manual_seed(0)
    images = torch.randn(24, 3, 32, 32, dtype=torch.float64)
    model = slimming.calibrate(randomise(models.preresnet(20, width=0.5)), [images])
    plan = aligned(slimming.trace(model, images[:1]), 0.3)
    thin = slimming.prune(model, plan)

    def error(network):
        with torch.no_grad():
            return float((network.eval()(images) - model.eval()(images)).square().mean())

    repaired = slimming.repair(model, thin, plan, [images])
    assert error(repaired) < 0.5 * error(thin)
    assert error(slimming.calibrate(thin, [images])) < error(thin)
    thin.train()(images).sum().backward()
    assert all(p.grad is not None for p in thin.parameters())


@pytest.mark.parametrize("first", ["aligned", "together", "apart"])
def test_pruned_again(first):
    """Behind selections of an earlier pruning, too, a class goes as a whole; the selections stay what they are."""
    model = randomise(models.preresnet(20, width=0.5))
    thin = assert_exact(model, slimming.trace(model, LARGER).plan(slimming.GlobalRatio(0.4), ties=first), LARGER)
    again = assert_exact(thin, aligned(slimming.trace(thin, LARGER), 0.4), LARGER)
    assert set(selecting(again)) <= set(selecting(thin)) and (first != "aligned" or not selecting(again))


# --- the plan -----------------------------------------------------------------------------------------------------------


def plan_of_preactivated():
    model = set_gammas(preactivated(), GAMMAS)
    return model, aligned(slimming.trace(model, IMAGE), 3 / 12)


def test_the_proof_misses_no_writer_that_the_plan_forgets():
    model, plan = plan_of_preactivated()
    slimming.prune(model, plan)
    for writer in ("stem", "conv2"):
        forgetful = copy.deepcopy(plan)
        del forgetful.zeroed[writer]
        with pytest.raises(PlanError, match="differs from the masked one"):
            slimming.prune(model, forgetful)


def test_a_plan_goes_through_json_and_those_of_format_3_load():
    model, plan = plan_of_preactivated()
    assert slimming.PruningPlan.from_json(plan.to_json()) == plan
    data = slimming.trace(model, IMAGE).plan(slimming.GlobalRatio(0.5), ties="apart").to_dict()
    del data["zeroed"]
    old = slimming.PruningPlan.from_dict(data | {"format": 3})
    assert old.zeroed == {} and old.to_dict()["format"] == 4
    slimming.prune(model, old)


@pytest.mark.parametrize(
    "zeroed",
    [
        *(
            [2],
            None,
            "stem",
            {"stem": None},
            {"stem": [4]},
            {"stem": [-1]},
            {"stem": []},
            {"stem": [2, 2]},
            {"stem": [True]},
        ),
        *({"stem": [1]}, {"bn1": [2]}, {"nowhere": [2]}, {3: [2]}, {"fc": [0]}),
    ],
    ids=str,
)
def test_filters_that_cannot_be_zeroed_are_refused(zeroed):
    _, plan = plan_of_preactivated()
    with pytest.raises(PlanError, match="plan: "):
        slimming.PruningPlan.from_dict(plan.to_dict() | {"zeroed": zeroed})


def test_a_mask_of_filters_that_are_not_there_is_refused():
    model, plan = plan_of_preactivated()
    for name, layer in (("stem", plan.layers["stem"]), ("nowhere", plan.layers["stem"])):
        wrong = copy.deepcopy(plan)
        wrong.layers[name], wrong.zeroed[name] = copy.deepcopy(layer), [99]
        with pytest.raises(PlanError, match=f"zeroed names filters of {name} that this network does not have"):
            slimming.mask(model, wrong)


def test_saved_and_loaded(tmp_path):
    model = randomise(models.preresnet(20, width=0.5)).float()
    graph = slimming.trace(model, LARGER.float())
    plan = aligned(graph, 0.5)
    thin = slimming.prune(model, plan)
    slimming.save(tmp_path / "thin.ckpt", thin, plans=[plan])
    again = slimming.load(tmp_path / "thin.ckpt", model=model)
    assert torch.equal(again.eval()(LARGER.float()), thin.eval()(LARGER.float()))


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ConfigError, match="reduce must be one of max, mean, sum"):
        aligned(slimming.trace(preactivated(), IMAGE), 0.5, reduce="median")


# --- networks of all kinds ----------------------------------------------------------------------------------------------


def assert_narrower_everywhere(model, example, ratio=0.5, **options):
    """Prune aligned: exact in eval and train mode, without a selection."""
    plan = aligned(slimming.trace(model, example), ratio, **options)
    thin = assert_exact(model, plan, example)
    assert not selecting(thin) and not empty_sides(thin) and plan.train_watched
    for name, layer in plan.layers.items():
        assert layer.kind != "norm" or (
            layer.select is None and layer.scatter is None and layer.width == len(layer.outs)
        ), name
    return plan


SAMPLE = {"resnet18", "densenet121", "mobilenet_v3_small", "shufflenet_v2_x0_5", "googlenet", "regnet_y_400mf"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n if n in SAMPLE else pytest.param(n, marks=pytest.mark.complete) for n in ZOO if n not in HUGE]
)
def test_torchvision(name):
    model, example = build_zoo(name)
    plan = assert_narrower_everywhere(model, example)
    assert plan.got["macs"] < 0.8 and plan.got["removed"] > 0
    slimming.prune(model, plan)  # proves itself


def assert_exact_on_a_random_network(steps, flat, ratio, min_channels):
    model, example = randomise(Net(steps, flat, seed=0)), torch.randn(1, 3, 6, 6, dtype=torch.float64)
    try:
        plan = assert_narrower_everywhere(model, example, ratio, min_channels=min_channels)
    except GraphError:
        return
    for name, module in model.named_modules():
        if isinstance(module, NORM):
            assert len(plan.keep.get(name, range(module.num_features))) >= min(min_channels, module.num_features)


RANDOM = given(program, st.booleans(), st.sampled_from([0.2, 0.5, 0.8, 0.99]), st.integers(1, 3))
SETTINGS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@pytest.mark.slow
@settings(max_examples=120, **SETTINGS)
@RANDOM
def test_random_networks(steps, flat, ratio, min_channels):
    assert_exact_on_a_random_network(steps, flat, ratio, min_channels)


@pytest.mark.complete
@settings(max_examples=1000, **SETTINGS)
@RANDOM
def test_many_random_networks(steps, flat, ratio, min_channels):
    assert_exact_on_a_random_network(steps, flat, ratio, min_channels)
