"""A run that is killed at any moment and started again ends with the bits of one that was never disturbed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from records import record

HERE = Path(__file__).parent
COMPLETE = {"train": 8, "writing": 6, "prune": 6, "slim": 6, "sweep": 4, "terminated": 4}
SAMPLE = {"train": 1, "writing": 1, "slim": 1, "terminated": 1}


def kill(command, count, folder):
    arguments = [sys.executable, str(HERE / "killing.py"), command, "0", str(count), str(folder)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "report.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("command", SAMPLE)
def test_a_sample_of_kills(command, tmp_path):
    assert not kill(command, SAMPLE[command], tmp_path)["wrong"]


@pytest.mark.complete
@pytest.mark.parametrize("command", COMPLETE)
def test_kills(command, tmp_path):
    found = kill(command, COMPLETE[command], tmp_path)
    record("kills", command=command, **found)
    assert not found["wrong"]


def test_there_are_enough():
    assert sum(COMPLETE.values()) >= 30
