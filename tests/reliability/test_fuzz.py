"""Every loader answers a damaged file with an error of ours or a valid object, within bounds of time, memory and place."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from records import record

HERE = Path(__file__).parent
COMPLETE = {"checkpoints": 400, "archives": 150, "plans": 600, "plans_applied": 150, "results": 500, "reports": 40}
COMPLETE |= {"reference_checkpoints": 250, "image_folders": 200, "caches": 200, "metrics": 100}
SAMPLE = {name: max(10, count // 20) for name, count in COMPLETE.items()}


def fuzz(name, first, count, folder):
    command = [sys.executable, str(HERE / "fuzzing.py"), name, str(first), str(count), str(folder)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600 + count
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "report.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPLETE)
def test_a_sample_of_damaged_files(name, tmp_path):
    found = fuzz(name, 0, SAMPLE[name], tmp_path)
    assert not found["faults"]
    assert found["error"] + found["object"] == SAMPLE[name]


@pytest.mark.complete
@pytest.mark.parametrize("name", COMPLETE)
def test_damaged_files(name, tmp_path):
    found = fuzz(name, 0, COMPLETE[name], tmp_path)
    record("fuzz", loader=name, files=COMPLETE[name], **found)
    assert not found["faults"]


def test_there_are_enough():
    assert sum(COMPLETE.values()) >= 2000
