"""Times are taken in turns, and their medians and ratios are what they say."""

import pytest

from slimming.deploy import timing
from slimming.deploy.timing import Timing, has_vnni, machine, time_in_turns


class Clock:
    """Stands for time.perf_counter; runs move it on."""

    def __init__(self, monkeypatch):
        self.now, self.order = 0.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def run(self, name, seconds):
        def go():
            self.order.append(name)
            self.now += seconds() if callable(seconds) else seconds

        return go


def test_the_median_and_the_quartiles():
    a = Timing((1.0, 2.0, 3.0, 4.0, 5.0), 1)
    assert a.median_ms == 3
    assert a.quartiles_ms == (2, 4)


def test_runs_take_turns_and_a_turn_warms_up(monkeypatch):
    clock = Clock(monkeypatch)
    found = time_in_turns({"a": clock.run("a", 0.01), "b": clock.run("b", 0.5)}, turns=4, turn_s=0.03)
    turn = ["a"] * (1 + 3) + ["b"]  # as often as fits into 0.03 s, after one unwatched pass; the slow one once
    assert clock.order == ["a"] * 2 + ["b"] * 2 + turn * 4
    assert found["a"].median_ms == pytest.approx(10)
    assert found["b"].turns_ms == pytest.approx([500] * 4)
    assert (found["a"].passes, found["b"].passes) == (3, 1)


def test_a_busy_moment_does_not_move_the_medians(monkeypatch):
    clock = Clock(monkeypatch)
    busy = lambda: 10.0 if len(clock.order) in (20, 21, 22, 23) else 0.04  # noqa: E731
    found = time_in_turns({"a": clock.run("a", busy), "b": clock.run("b", 0.08)}, turns=9)
    assert found["a"].median_ms == pytest.approx(40)
    assert found["b"].median_ms == pytest.approx(80)


@pytest.mark.parametrize(("budget", "turns"), [(1e9, 15), (10.0, 10), (2.0, 3), (0.1, 3)])
def test_the_budget_takes_turns_away_but_leaves_three(monkeypatch, budget, turns):
    clock = Clock(monkeypatch)
    found = time_in_turns({"a": clock.run("a", 1.0)}, budget_s=budget)
    assert len(found["a"].turns_ms) == turns


def test_a_run_that_takes_no_time_ends(monkeypatch):
    clock = Clock(monkeypatch)
    assert time_in_turns({"a": clock.run("a", 0.0)}, turns=3)["a"].passes == timing.MOST_PASSES


def test_the_machine_says_what_latencies_depend_on():
    found = machine()
    assert found["cpu"]
    assert found["cores"] >= 1
    assert {"torch", "compile", "onnxruntime", "openvino"} == found["engines"].keys()
    assert set(found["flags"]) <= set(timing.FLAGS)


@pytest.mark.parametrize(
    ("flags", "there"),
    [(["avx2", "avx_vnni"], True), (["avx512_vnni"], True), (["asimddp"], True), (["avx512f"], False)],
)
def test_which_machines_have_vnni(flags, there):
    assert has_vnni(flags) is there
