"""The smallest network of every timm family with BatchNorm scales, both ways of ties, eval and train mode."""

import sys

import pytest
from exactness import assert_exact, empty_sides

import slimming
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from zoo import FAMILIES, build

# What `together` leaves alone there, at most, as a share of the gammas; results/zoo.md says why. Nothing elsewhere.
LEFT = {
    "bat_resnext26ts": 0.03,
    "cpubone_nano": 0.15,
    "eca_botnext26ts_256": 0.05,
    "eca_resnext26ts": 0.13,
    "eca_vovnet39b": 0.44,
    "ecaresnet26t": 0.75,
    "ecaresnext26t_32x4d": 0.61,
    "efficientformer_l1": 0.12,
    "efficientformerv2_s0": 0.44,
}


def test_there_are_115_families():
    assert len(set(FAMILIES)) == 115 and set(LEFT) <= set(FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_pruned_equals_masked_and_nothing_is_refused(name):
    model, example = build(name)
    graph = slimming.trace(model, example)
    shares = graph.shares()
    assert shares["apart"] == 1 and shares["together"] >= 1 - LEFT.get(name, 0)
    for ties in ("together", "apart"):
        plan = graph.plan(slimming.GlobalRatio(0.5), ties=ties)
        thin = assert_exact(model, plan, example)
        assert plan.train_watched and plan.got["removed"] > 0 and not empty_sides(thin)
        slimming.prune(model, plan)
