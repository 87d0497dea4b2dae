"""Layers split into factors of low rank: exact at full rank, cheaper below it, described by plain data."""

import json

import pytest
import torch
from exactness import randomise
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_random_nets import Net, program
from torch import nn

import slimming
from slimming import models
from slimming.channels.low_rank import LowRank, _factorise, low_rank, low_rank_like
from slimming.errors import ConfigError, GraphError, PlanError, SlimmingError

CONVOLUTIONS = [
    (nn.Conv2d(6, 8, 3, padding=1, bias=False), "tucker", [6, 8]),
    (nn.Conv2d(9, 2, (3, 5), (2, 1), (1, 0), (1, 2)), "tucker", [9, 2]),
    (nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), "tucker", [4, 6]),
    (nn.Conv2d(6, 8, 3, padding=1, bias=False), "spatial", [18]),
    (nn.Conv2d(9, 2, (3, 5), (2, 1), (1, 0), (1, 2)), "spatial", [10]),
    (nn.Conv2d(3, 8, 4, padding="same"), "spatial", [12]),
    (nn.Conv2d(6, 8, 1, (2, 1), (1, 2)), "svd", [6]),
    (nn.Conv2d(8, 3, 1, bias=False), "svd", [3]),
]


def vgg():
    torch.manual_seed(0)
    return randomise(models.vgg(depth=11, width=0.25)).eval()


EXAMPLE = torch.randn(2, 3, 32, 32, dtype=torch.float64)


def same(a, b, example):
    with torch.no_grad():
        torch.testing.assert_close(a(example), b(example), rtol=1e-9, atol=1e-9)


def filled(layer, split):
    """Split a layer by these ranks, whatever they cost."""
    whole = nn.Sequential(layer)
    result = low_rank_like(whole, {"0": split})
    with torch.no_grad():
        _factorise(layer, result[0], split)
    return whole, result


@pytest.mark.parametrize("layer, kind, ranks", CONVOLUTIONS)
def test_full_rank_changes_nothing(layer, kind, ranks):
    torch.manual_seed(0)
    whole, result = filled(layer.double(), {"kind": kind, "ranks": ranks})
    assert isinstance(result[0], LowRank) and isinstance(whole[0], nn.Conv2d)
    same(whole, result, torch.randn(2, layer.in_channels, 11, 12, dtype=torch.float64))
    with pytest.raises(PlanError, match="ranks"):
        low_rank_like(whole, {"0": {"kind": kind, "ranks": [r + 1 for r in ranks]}})


@pytest.mark.parametrize("sizes", [(5, 9), (9, 5)])
def test_a_linear_layer_gets_the_nearest_of_its_rank(sizes):
    torch.manual_seed(0)
    layer = nn.Linear(*sizes).double()
    same(*filled(layer, {"kind": "svd", "ranks": [5]}), torch.randn(3, sizes[0], dtype=torch.float64))
    _, result = filled(layer, {"kind": "svd", "ranks": [2]})
    u, s, v = torch.linalg.svd(layer.weight.detach())
    torch.testing.assert_close(result[0][1].weight @ result[0][0].weight, u[:, :2] @ torch.diag(s[:2]) @ v[:2])


def test_weights_of_low_rank_are_found_exactly():
    torch.manual_seed(0)
    layer = nn.Conv2d(32, 32, 3, padding=1).double()
    with torch.no_grad():
        layer.weight.copy_(torch.einsum("owr,rih->oihw", torch.randn(32, 3, 4), torch.randn(4, 32, 3)))
    example = torch.randn(2, 32, 8, 8, dtype=torch.float64)
    result, splits, _ = low_rank(nn.Sequential(layer), example, 0.3)
    assert splits["0"]["kind"] == "spatial"
    with torch.no_grad():
        torch.testing.assert_close(result(example), layer(example), rtol=1e-5, atol=1e-5)


def test_the_whole_share_changes_nothing():
    model = vgg()
    result, splits, share = low_rank(model, EXAMPLE, 1.0)
    assert splits == {} and share == 1
    same(model, result, EXAMPLE)


def test_cost_follows_the_share():
    model = vgg()
    dense, before = slimming.cost(model, EXAMPLE).macs, {k: v.clone() for k, v in model.state_dict().items()}
    costs = []
    for share in (0.9, 0.6, 0.3):
        result, splits, got = low_rank(model, EXAMPLE, share)
        costs.append(slimming.cost(result, EXAMPLE).macs)
        assert costs[-1] / dense == pytest.approx(got) and share - 0.05 < got <= share and splits
        macs, wide = slimming.cost(result, EXAMPLE).layers, slimming.cost(model, EXAMPLE).layers
        for name in splits:
            assert sum(count for key, count in macs.items() if key.startswith(f"{name}.")) < wide[name]
    assert costs == sorted(costs, reverse=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_smaller_share_loses_more(kernel):
    torch.manual_seed(0)
    layer, example = nn.Conv2d(24, 24, kernel).double(), torch.randn(2, 24, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        results = [low_rank(nn.Sequential(layer), example, share).model for share in (1.0, 0.8, 0.5, 0.2)]
        errors = [float((result(example) - layer(example)).norm()) for result in results]
    assert errors[0] == 0 and errors == sorted(errors) and len(set(errors)) == 4


def test_ranks_are_plain_data_that_rebuild_the_architecture():
    model = vgg()
    result, splits, _ = low_rank(model, EXAMPLE, 0.4)
    again = low_rank_like(model, json.loads(json.dumps(splits))).eval()
    again.load_state_dict(result.state_dict())
    same(result, again, EXAMPLE)
    with torch.device("meta"):
        outline = models.vgg(depth=11, width=0.25)
    shapes = {k: v.shape for k, v in low_rank_like(outline, splits).state_dict().items()}
    assert shapes == {k: v.shape for k, v in result.state_dict().items()}


def test_it_composes_with_pruning():
    torch.manual_seed(0)
    model = randomise(models.preresnet(depth=11, width=2)).eval()
    thin = slimming.prune(model, slimming.trace(model, EXAMPLE).plan(slimming.GlobalRatio(0.5), ties="apart")).eval()
    result, splits, _ = low_rank(thin, EXAMPLE, 0.7)
    assert splits and type(result) is type(thin)
    trained = result.train()
    trained(EXAMPLE).sum().backward()
    assert all(p.grad is not None for p in trained.parameters())


def test_grouped_and_shared_layers_stay_whole():
    shared = nn.Conv2d(16, 16, 3, padding=1)
    tied = nn.Conv2d(16, 16, 3, padding=1)
    tied.weight = nn.Parameter(tied.weight)
    other = nn.Conv2d(16, 16, 3, padding=1)
    other.weight = tied.weight
    grouped, free = nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.Conv2d(16, 16, 3, padding=1)
    model = nn.Sequential(shared, nn.ReLU(), shared, tied, other, grouped, free).eval()
    assert set(low_rank(model, torch.randn(2, 16, 8, 8), 0.5).splits) == {"6"}


def test_a_target_that_rank_one_misses_is_refused():
    for share, message in ((1e-6, "rank 1"), (0, "low_rank must be"), (1.5, "low_rank must be")):
        with pytest.raises(ConfigError, match=message):
            low_rank(vgg(), EXAMPLE, share)


def test_code_that_reads_a_split_layer_is_refused():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 32, 3)

        def forward(self, x):
            return self.conv(x) * self.conv.weight.mean()

    with pytest.raises(GraphError, match="split into factors"):
        low_rank(Reads().double(), EXAMPLE, 0.5)


@pytest.mark.parametrize(
    "splits",
    [
        {"nowhere": {"kind": "svd", "ranks": [1]}},
        {"feature.0": None},
        {"feature.0": {"kind": "svd", "ranks": [1]}},
        {"feature.0": {"kind": "tucker", "ranks": [1]}},
        {"feature.0": {"kind": "tucker", "ranks": [1, 0]}},
        {"feature.0": {"kind": "tucker", "ranks": [1, True]}},
        {"feature.1": {"kind": "svd", "ranks": [1]}},
    ],
)
def test_data_of_another_network_are_refused(splits):
    with pytest.raises(SlimmingError):
        low_rank_like(vgg(), splits)


@pytest.mark.slow
@settings(
    max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(program, st.booleans(), st.sampled_from([0.5, 0.8, 1.0]))
def test_random_networks_keep_to_the_share(steps, flat, share):
    model = randomise(Net(steps, flat, seed=0)).eval()
    example = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    try:
        result, splits, got = low_rank(model, example, share)
    except ConfigError:
        return
    assert got <= share + 1e-9 and set(splits) == {n for n, m in result.named_modules() if isinstance(m, LowRank)}
    assert slimming.cost(result, example).macs <= slimming.cost(model, example).macs
