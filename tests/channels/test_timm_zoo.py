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
    "cpubone_nano": 0.14,
    "densenet121": 0.01,
    "densenetblur121d": 0.01,
    "dpn48b": 0.01,
    "eca_botnext26ts_256": 0.05,
    "eca_resnext26ts": 0.13,
    "eca_vovnet39b": 0.43,
    "ecaresnet26t": 0.75,
    "ecaresnext26t_32x4d": 0.6,
    "efficientformer_l1": 0.12,
    "efficientformerv2_s0": 0.37,
    "efficientvim_m1": 0.37,
    "efficientvit_m0": 0.29,
    "fasternet_t0": 0.13,
    "fastvit_t8": 0.76,
    "fbnetv3_b": 0.01,
    "gcresnet33ts": 0.13,
    "gcresnext26ts": 0.13,
    "ghostnet_050": 0.1,
    "ghostnetv3_050": 0.08,
    "hgnetv2_b0": 0.82,
    "iformer_t": 0.51,
    "inception_next_atto": 0.02,
    "lambda_resnet26t": 0.12,
    "lamhalobotnet50ts_256": 0.02,
    "levit_128s": 0.2,
    "lowformer_b0": 0.25,
    "regnetv_040": 0.04,
    "repvit_m1": 0.57,
    "shvit_s1": 0.33,
    "starnet_s050": 0.54,
    "swiftformer_xs": 0.15,
    "tiny_vit_5m_224": 0.5,
    "visformer_tiny": 0.11,
    "xcit_nano_12_p8_224": 0.95,
}


def test_there_are_115_families():
    assert len(set(FAMILIES)) == 115 and set(LEFT) <= set(FAMILIES)


SAMPLE = set(FAMILIES[::6]) - {"halonet_h1", "volo_d1_224"}  # `make test-all` takes every family


@pytest.mark.slow
@pytest.mark.parametrize("name", [n if n in SAMPLE else pytest.param(n, marks=pytest.mark.complete) for n in FAMILIES])
def test_pruned_equals_masked_and_nothing_is_refused(name):
    model, example = build(name)
    graph = slimming.trace(model, example)
    shares = graph.shares()
    assert shares["apart"] == 1 and shares["together"] >= 1 - LEFT.get(name, 0)
    for ties in ("together", "apart", *["aligned"] * bool(shares["aligned"])):
        plan = graph.plan(slimming.GlobalRatio(0.5), ties=ties)
        thin = assert_exact(model, plan, example)
        assert plan.train_watched and plan.got["removed"] > 0 and not empty_sides(thin)
        slimming.prune(model, plan)
