"""The shipped configuration, composed as the command line would, and shrunk."""

import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; what they start inherits it
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import pytest
from hydra import compose, initialize_config_dir

from slimming import config

ROOT = Path(__file__).parents[1]
SMALL = (
    "model=vgg11",
    "model.widths=[4,M,6]",
    "data=digits",
    "data.image_size=8",
    "data.crop=1",
    "trainer.max_epochs=2",
)
SMALL += ("trainer.limit_train_batches=4", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu")


def compose_config(*overrides: str, name: str = "train") -> config.TrainConfig:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return config.check(compose(name, list(overrides)))


@pytest.fixture
def small():
    """A function: overrides -> the configuration of a training that takes about a second."""
    return lambda *overrides: compose_config(*SMALL, *overrides)


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _data_anew():
    """No test gets the data that another has loaded."""
    from slimming.stages import building

    building._last_data.cache_clear()
