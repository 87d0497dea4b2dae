"""Shares of latency from fresh processes: what counts, what is too noisy. But for two smoke tests nothing is timed."""

from pathlib import Path

import pytest
from small_networks import onnx_bytes

from slimming import checkpoint, models
from slimming.deploy.sharing import Pair, Setting, glanced_share, measured_share, time_pair
from slimming.errors import LatencyError
from slimming.records import Record

SETTING = Setting("onnxruntime", (2, 3, 8, 8), 1)
HERE = Path("dense.onnx"), Path("thin.onnx")


def timer(*shares):
    """Return what finds these shares, one for each process, and the list of turns that it was asked for."""
    left, turns = list(shares), []

    def time(dense, thin, setting, asked):
        turns.append(asked)
        share = left.pop(0)
        return Pair(share, 10.0, 10.0 * share)

    return time, turns


def test_a_share_is_the_median_of_five_processes_of_fifty_turns():
    time, turns = timer(0.5, 0.51, 0.49, 0.5, 0.9)
    share = measured_share(*HERE, SETTING, time)
    assert share.median == 0.5 and share.spread == pytest.approx(0.02) and share.milliseconds == (10.0, 5.0)
    assert turns == [50] * 5


def test_what_is_noisy_is_measured_again():
    time, turns = timer(*[0.3, 0.4, 0.5, 0.6, 0.7], *[0.5] * 5)
    assert measured_share(*HERE, SETTING, time).spread == 0.0 and len(turns) == 10


def test_what_stays_noisy_is_refused_with_the_spreads():
    time, turns = timer(*[0.3, 0.4, 0.5, 0.6, 0.7] * 3)
    with pytest.raises(LatencyError, match=r"too noisy .* 40\.0%, 40\.0%, 40\.0% of the median"):
        measured_share(*HERE, SETTING, time)
    assert len(turns) == 15


def test_a_glance_is_short():
    time, turns = timer(0.4, 0.6)
    assert glanced_share(*HERE, SETTING, time) == pytest.approx(0.5) and turns == [15, 15]


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_a_wider_network_takes_longer_in_a_fresh_process(engine, tmp_path):
    """A smoke test; widths differ so much that noise does not turn it round."""
    paths = []
    for name, width in (("dense", 256), ("thin", 8)):
        built = {"name": "vgg", "arguments": {"widths": [width, width, "M", width]}}
        model = models.build(built["name"], **built["arguments"])
        paths.append(tmp_path / f"{name}{'.onnx' if engine == 'onnxruntime' else '.ckpt'}")
        if engine == "torch":
            checkpoint.write_network(model, Record(built), paths[-1])
        else:
            paths[-1].write_bytes(onnx_bytes(model))
    pair = time_pair(*paths, Setting(engine, (8, 3, 8, 8), 1), 3)
    assert pair.share < 0.5 and pair.thin_ms < pair.dense_ms


def test_a_process_that_fails_says_why(tmp_path):
    with pytest.raises(LatencyError, match=r"cannot time the network in onnxruntime: .*there is no file"):
        time_pair(tmp_path / "a.onnx", tmp_path / "b.onnx", SETTING, 3)
