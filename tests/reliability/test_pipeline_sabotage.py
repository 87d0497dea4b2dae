"""The suite notices faults in data, penalty and resume: for each there is a test that fails under it, named beside it."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from records import record
from sabotaged import PATCHES

HERE = Path(__file__).parent
FAILED, PASSED = 1, 0  # pytest's exit codes; 2 and more: it could not run the test
SAMPLE = random.Random(1).sample(sorted(PATCHES), 3)


def outcome(test, sabotage=None):
    plugin = ["-p", "sabotaged"] if sabotage else []
    path = f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *plugin, test]
    done = subprocess.run(
        command,
        cwd=HERE.parent,
        env=env | {"SABOTAGE": sabotage or "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout


def assert_noticed(sabotage):
    code, said = outcome(PATCHES[sabotage][1], sabotage)
    record("pipeline", saboteur=sabotage, test=PATCHES[sabotage][1], caught=code == FAILED)
    assert code == FAILED, said[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("sabotage", SAMPLE)
def test_a_sample_is_noticed(sabotage):
    assert_noticed(sabotage)


@pytest.mark.complete
@pytest.mark.parametrize("sabotage", sorted(PATCHES))
def test_every_one_is_noticed(sabotage):
    assert_noticed(sabotage)


@pytest.mark.complete
def test_without_sabotage_the_same_tests_pass():
    for test in sorted({test for _, test in PATCHES.values()}):
        code, said = outcome(test)
        assert code == PASSED, said[-3000:]
