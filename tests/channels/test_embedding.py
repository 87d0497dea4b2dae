"""A widened network computes what the thin one does, and its widths are what was asked."""

import pytest
import torch
from exactness import randomise, widen
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_random_nets import Net, program
from torch import nn

import slimming
from residual import Residual
from slimming import models
from slimming.channels import embedding
from slimming.channels.embedding import embed, selecting
from slimming.channels.layers import SelectBatchNorm
from slimming.errors import GraphError, PlanError

NETWORKS = {
    "vgg": {"depth": 11, "width": 0.25},
    "preresnet": {"depth": 20},
    "densenet": {"depth": 13, "growth": 6},
    "resnet18": {},
    "mobilenet_v2": {},
    "googlenet": {},
    "shufflenet_v2_x0_5": {},
}


def build(name):
    kind = (name, NETWORKS[name]) if NETWORKS[name] else ("torchvision", {"name": name})
    return randomise(models.build(kind[0], **kind[1]))


def thinned(model, example, ties="together", ratio=0.6):
    return slimming.prune(model, slimming.trace(model, example).plan(slimming.GlobalRatio(ratio), ties=ties))


def assert_same(a, b, example):
    with torch.no_grad():
        torch.testing.assert_close(a.eval()(example), b.eval()(example), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("ties", ["together", "apart", "aligned"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_widens_exactly(name, ties):
    example = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    thin = thinned(build(name), example, ties)
    graph = slimming.trace(thin, example)
    for block, full in ((1, []), (8, []), (8, selecting(thin))):
        wide = embed(graph, block, full)
        assert type(wide) is type(thin) and set(wide.state_dict()) == set(thin.state_dict())
        assert_same(thin, wide, widen(example, 3))


@pytest.mark.parametrize("block", [4, 16])
def test_a_chain_has_multiples_of_the_block_everywhere_but_at_its_ends(block):
    example = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    thin = thinned(build("vgg"), example)
    wide = embed(slimming.trace(thin, example), block)
    for before, after in zip(thin.modules(), wide.modules(), strict=True):
        if isinstance(before, nn.Conv2d):
            assert after.out_channels == after.weight.shape[0] == -(-before.out_channels // block) * block
        if isinstance(before, nn.BatchNorm2d):
            new = after.weight == 0
            assert int(new.sum()) == after.num_features - before.num_features
            assert (
                not after.bias[new].any() and not after.running_mean[new].any() and (after.running_var[new] == 1).all()
            )
    assert wide.classifier.out_features == 10 and wide.feature[0].in_channels == 3


@pytest.mark.parametrize("ties", ["together", "apart"])
def test_full_width_leaves_no_selection_and_only_the_named_ones_change(ties):
    example = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    thin = thinned(build("preresnet"), example, ties)
    names, graph = selecting(thin), slimming.trace(thin, example)
    assert len(names) > 3
    assert selecting(embed(graph, 8, names)) == []
    one = embed(graph, 1, names[2:3])
    assert selecting(one) == [n for n in names if n != names[2]]
    assert one.get_submodule(names[2]).num_features > thin.get_submodule(names[2]).num_features
    assert_same(thin, one, example)


def test_a_scatter_becomes_a_batchnorm_of_full_width():
    example = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    thin = thinned(randomise(Residual()), example, "apart", 0.5)
    scattering = [n for n in selecting(thin) if thin.get_submodule(n).scatter is not None]
    assert scattering
    for block in (1, 8):
        wide = embed(slimming.trace(thin, example), block, selecting(thin))
        assert not any(isinstance(m, SelectBatchNorm) for m in wide.modules())
        assert_same(thin, wide, example)
        padded = embed(slimming.trace(thin, example), block)
        assert_same(thin, padded, example)


def test_networks_pruned_twice_need_no_earlier_plan():
    example = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    thin = thinned(thinned(build("preresnet"), example, ratio=0.4), example, "apart", 0.4)
    wide = embed(slimming.trace(thin, example), 8, selecting(thin))
    assert selecting(wide) == []
    assert_same(thin, wide, example)


def test_the_thin_network_is_not_changed():
    example = torch.randn(2, 3, 32, 32)
    thin = thinned(build("preresnet").float(), example)
    before = {k: v.clone() for k, v in thin.state_dict().items()}
    embed(slimming.trace(thin, example), 16, selecting(thin))
    assert all(torch.equal(v, before[k]) for k, v in thin.state_dict().items())


def test_a_wrong_place_is_refused(monkeypatch):
    example = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    thin = thinned(build("preresnet"), example)
    spread = embedding._spread
    monkeypatch.setattr(
        embedding, "_spread", lambda t, axis, e, fill: spread(t, axis, e[::-1] if t.ndim == 4 else e, fill)
    )
    with pytest.raises(PlanError, match="differs"):
        embed(slimming.trace(thin, example), 8)


@pytest.mark.slow
@settings(
    max_examples=60, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(program, st.booleans(), st.sampled_from([0.3, 0.6]), st.sampled_from([1, 4, 8]))
def test_random_networks_widen_exactly(steps, flat, ratio, block):
    model = randomise(Net(steps, flat, seed=0))
    example = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for ties in ("together", "apart", "aligned"):
        try:
            thin = thinned(model, example, ties, ratio)
        except GraphError:
            continue
        graph = slimming.trace(thin, example)
        for full in ([], selecting(thin)):
            assert_same(thin, embed(graph, block, full), example)
