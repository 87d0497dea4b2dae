"""Training of detectors: the loss, the one gradient of the penalty, mean average precision."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slimming import models
from slimming.data import Digits
from slimming.errors import ConfigError
from slimming.training import detection
from slimming.training.detection import BACKENDS, DetectionModule, mean_average_precision
from slimming.training.module import SlimmingModule
from squares import Squares, make_trainer, small_detector

pytestmark = pytest.mark.filterwarnings("ignore")


def found(boxes: list, scores: list[float], labels: list[int]) -> dict[str, torch.Tensor]:
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "scores": torch.tensor(scores), "labels": torch.tensor(labels, dtype=torch.long)}


def target(boxes: list, labels: list[int]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in found(boxes, [], labels).items() if k != "scores"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_mean_average_precision_by_hand(backend, capfd, caplog):
    """Class 0 has three objects: the first detection hits one exactly (at every IoU), the second nothing, the third another
    with an IoU of 0.62, the last object is missed. Class 1 is found. Class 2 is only imagined: it does not count.

    At IoUs of 0.5, 0.55 and 0.6 class 0 has precision 1 up to a recall of 1/3 and 2/3 up to 2/3: of the 101 points of recall
    0 ... 1, the 34 up to 0.33 and the 33 up to 0.66. At the 7 higher IoUs the third detection is wrong, too: 34 points.
    """
    pytest.importorskip(backend)
    first = found([[0, 0, 10, 10], [40, 40, 50, 50], [20, 0, 30, 6.2]], [0.9, 0.8, 0.7], [0, 0, 0])
    second = found([[5, 5, 25, 25], [0, 0, 9, 9]], [0.6, 0.9], [1, 2])
    pairs = [
        (first, target([[0, 0, 10, 10], [20, 0, 30, 10]], [0, 0])),
        (second, target([[5, 5, 25, 25], [50, 50, 60, 60]], [1, 0])),
        (found([], [], []), target([], [])),
    ]
    low, high = (34 + 33 * 2 / 3) / 101, 34 / 101
    caplog.set_level("INFO")
    computed = mean_average_precision(pairs, backend)
    assert not caplog.records and capfd.readouterr() == ("", "")
    assert computed["map50"] == pytest.approx((low + 1) / 2, abs=1e-6)
    assert computed["map"] == pytest.approx(((3 * low + 7 * high) / 10 + 1) / 2, abs=1e-6)


def test_without_any_object_there_is_no_precision():
    pairs = [(found([[0, 0, 1, 1]], [0.5], [0]), target([], []))]
    assert mean_average_precision(pairs, BACKENDS[0]) == {}


def test_without_the_metrics_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(detection, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=r"pip install 'slimming\[detection\]'"):
        DetectionModule(small_detector(), torch.optim.SGD)


class Asking(torch.nn.Module):
    """A detector that trains on targets, and notes what it is given."""

    trains_on_targets = True

    def __init__(self):
        super().__init__()
        self.net, self.seen = small_detector(), []
        self.loss, self.detections = self.net.loss, self.net.detections

    def forward(self, images, targets=None):
        self.seen.append((self.training, targets))
        return self.net(images)


def test_a_network_that_asks_for_targets_gets_them_in_trainings_alone():
    module = DetectionModule(Asking(), lambda p: torch.optim.SGD(p, 1e-3))
    make_trainer().fit(module, datamodule=Squares(batch_size=6, val=6))
    seen = [targets for training, targets in module.model.seen if training]
    assert [len(targets) for targets in seen] == [6] * 4 and seen[0][0].keys() == {"boxes", "labels"}
    others = [targets for training, targets in module.model.seen if not training]
    assert others and not any(others)


def test_a_classifier_is_refused():
    with pytest.raises(ConfigError, match="trains a detector, and VGG has no methods loss"):
        DetectionModule(models.vgg(depth=11, width=0.1), torch.optim.SGD)


def test_data_of_the_other_task_are_refused():
    module, squares = DetectionModule(small_detector(), torch.optim.SGD), Squares(batch_size=6)
    with pytest.raises(ConfigError, match=r"needs images with boxes, .* data=boxes or data=scenes"):
        make_trainer().test(module, datamodule=Digits(image_size=64), verbose=False)
    classifier = SlimmingModule(models.vgg(widths=[4], in_channels=1), 10, torch.optim.SGD)
    with pytest.raises(ConfigError, match="images with boxes: give task=detection"):
        make_trainer().test(classifier, datamodule=squares, verbose=False)


class InLoss(DetectionModule):
    """Autograd of the loss with the penalty in it."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.05 * sum(g.abs().sum() for g in self.penalty.gammas.values())

    def on_after_backward(self):
        pass


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_penalty_is_that_of_autograd(accumulate):
    trained = []
    for kind in (DetectionModule, InLoss):
        module = kind(small_detector(), lambda p: torch.optim.SGD(p, 1e-3, 0.9), sparsity=0.05)
        trainer = make_trainer(precision="64-true", accumulate_grad_batches=accumulate, limit_val_batches=0)
        trainer.fit(module, datamodule=Squares(batch_size=6))
        trained.append(module.model.state_dict())
    before = small_detector().state_dict()
    for key, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][key], rtol=1e-12, atol=1e-12)
    assert not torch.equal(trained[0]["deep.0.weight"].float(), before["deep.0.weight"])


def test_what_is_logged():
    module = DetectionModule(small_detector(), lambda p: torch.optim.SGD(p, 1e-3))
    trainer = make_trainer()
    trainer.fit(module, datamodule=Squares(batch_size=6))
    logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
    parts = [logged[f"train/{part}"] for part in ("box", "objectness", "classes")]
    assert logged["train/loss"] == pytest.approx(sum(parts), rel=1e-5) and all(part > 0 for part in parts)
    assert 0 <= logged["test/map"] <= logged["test/map50"] <= 1 and logged["test/loss"] > 0
    assert module.evaluated == {"train": 24, "test": 12}


def test_an_evaluation_without_objects_logs_the_loss_alone():
    module = DetectionModule(small_detector(), lambda p: torch.optim.SGD(p, 1e-3))
    (logged,) = make_trainer().test(module, datamodule=Squares(test=1), verbose=False)
    assert set(logged) == {"test/loss"}


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    """The same weights after an epoch in which BatchNorm is held still; the same metrics, also where a rank sees no image."""
    here = Path(__file__).parent
    script = str(here / "two_ranks_detection.py")
    paths = filter(None, (str(here.parent), os.environ.get("PYTHONPATH")))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    for prefix, folder in (([sys.executable], tmp_path / "one"), (command, tmp_path / "two")):
        folder.mkdir()
        done = subprocess.run(
            [*prefix, script, str(folder)], capture_output=True, text=True, timeout=300, env=environment
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / n / "weights.pt", weights_only=True) for n in ("one", "two"))
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-10, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}")
    one, two = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("one", "two"))
    assert one[0]["test/map50"] > 0
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-9)
