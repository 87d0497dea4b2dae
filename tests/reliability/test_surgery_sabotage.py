"""The proof catches every sabotage of the surgery that changes what a network computes."""

import random
from collections import Counter

import pytest
import saboteurs  # noqa: F401  registers them
from records import record
from sabotage import NETWORKS, SABOTEURS, TIES, attempt

TINY = {"one weight off by a millionth", "weights in single precision"}  # about as large as rounding
BARREN = {"a head that is shared no more", "left in train mode", "a stale num features", "stale channel counts"}


def strike(network, names):
    """Try saboteurs on one network, with each way of ties; return the verdicts."""
    tried = [attempt(name, network, ties) for ties in TIES for name in sorted(names)]
    return [verdict for verdict in tried if verdict]


def assert_none_missed(verdicts):
    for v in verdicts:
        assert v.verdict != "missed", v


def test_there_are_enough_of_them():
    assert len(SABOTEURS) >= 40 + len(TINY | BARREN) and len(NETWORKS) >= 6


@pytest.mark.parametrize("network", NETWORKS)
def test_a_sample_is_caught(network):
    names = random.Random(network).sample(sorted(SABOTEURS), 10)
    verdicts = strike(network, names)
    assert_none_missed(verdicts)
    assert sum(v.verdict == "caught" for v in verdicts) >= 4


@pytest.mark.parametrize("network", ["preresnet20", "odd"])
def test_a_filter_that_is_forgotten_is_caught(network):
    """The mask is told which filters are zero: a writer that the plan forgot must not pass, whatever the surgery removed."""
    verdicts = strike(network, [name for name in SABOTEURS if "filter" in name and name.startswith("a mask")])
    assert len(verdicts) >= 3
    assert {(v.verdict, v.ties) for v in verdicts} == {("caught", "aligned")}


@pytest.mark.parametrize("name", sorted(BARREN))
def test_what_changes_nothing_is_no_alarm(name):
    """Sizes that torch ignores and modes that the proof sets anew."""
    assert attempt(name, "preresnet20", "apart").verdict == "no change"


@pytest.mark.complete
@pytest.mark.parametrize("network", NETWORKS)
def test_every_one_is_caught(network):
    verdicts = strike(network, SABOTEURS)
    for v in verdicts:
        record("surgery", saboteur=v.saboteur, network=network, ties=v.ties, verdict=v.verdict)
    assert_none_missed(verdicts)
    assert Counter(v.verdict for v in verdicts)["caught"] >= 60
