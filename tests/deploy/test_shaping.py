"""Shapes of a pruned network: the candidates, the choice among them, and what is recorded of it."""

import json

import pytest
import torch
from torch import nn

import slimming
from slimming import models
from slimming.deploy.shaping import AS_PRUNED, Shape, choose, replayed, shaped, shapes_of
from slimming.errors import SlimmingError

EXAMPLE = torch.randn(2, 3, 16, 16)


@pytest.fixture(scope="module")
def thin() -> nn.Module:
    torch.manual_seed(0)
    model = models.preresnet(depth=11, num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
    return slimming.prune(model, slimming.trace(model, EXAMPLE).plan(slimming.GlobalRatio(0.6))).eval()


def test_full_width_is_a_candidate_only_where_something_selects(thin):
    assert len(shapes_of(thin)) == 8 and AS_PRUNED in shapes_of(thin)
    assert {shape.selections for shape in shapes_of(models.vgg(depth=11, width=0.1))} == {"select"}


def test_all_shapes_compute_the_same(thin):
    made, refused = shaped(thin, EXAMPLE, shapes_of(thin))
    assert not refused
    assert made[AS_PRUNED] is thin and len(made) == 8
    with torch.no_grad():
        for network in made.values():
            torch.testing.assert_close(network(EXAMPLE), thin(EXAMPLE), rtol=1e-4, atol=1e-5)


def test_the_fastest_is_chosen_and_of_equals_the_one_that_adds_least():
    times = {Shape(): 5.0, Shape(8): 2.0, Shape(16): 1.99, Shape(8, "full"): 2.0, "dense": 4.0}
    candidates = {shape: None for shape in times if shape != "dense"}
    decision = choose(candidates, lambda runs: {key: times[key] for key in runs}, dense="model")
    assert decision.shape == Shape(8) and decision.beats_dense
    assert choose(candidates, lambda runs: times, margin=0).shape == Shape(16)
    lines = decision.table().splitlines()
    assert "block 16, select" in lines[2] and "2.01" in lines[2]
    assert lines[3].endswith("<-") and "no shape" not in lines[-1]


def test_it_says_when_nothing_beats_the_dense_network():
    decision = choose({Shape(): None}, lambda runs: {Shape(): 5.0, "dense": 4.0}, dense="model")
    assert decision.beats_dense is False and "no shape" in decision.table()


def test_a_recorded_decision_is_replayed(thin):
    shape = Shape(8, "full")
    decision = choose({shape: None}, lambda runs: {shape: 1.0})
    again = replayed(json.loads(json.dumps(decision.shape.record())), "export.json")
    assert again == shape
    first, second = (shaped(thin, EXAMPLE, [s]).made[shape].state_dict() for s in (shape, again))
    assert all(torch.equal(first[key], second[key]) for key in first)
    json.dumps(decision.record_times())


GOOD = {"block": 8, "selections": "full"}


@pytest.mark.parametrize(
    "record",
    [None, {}, GOOD | {"block": 0}, GOOD | {"block": True}, GOOD | {"selections": "x"}],
)
def test_a_damaged_record_is_refused(record):
    with pytest.raises(SlimmingError):
        replayed(record, "export.json")
