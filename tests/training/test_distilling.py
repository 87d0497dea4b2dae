"""Detectors that learn from a teacher: what is trained and logged, and what the teacher stays out of."""

import pytest
import torch
from torch import nn

from slimming import models
from slimming.errors import ConfigError
from slimming.training.detection import DetectionModule
from slimming.training.distillation import DistillingDetectionModule, check_same_layout
from squares import Squares, make_trainer, small_detector

pytestmark = pytest.mark.filterwarnings("ignore")


def sgd(parameters):
    return torch.optim.SGD(parameters, 1e-3, 0.9)


def module(alpha=0.5, **more):
    teacher = small_detector(1 / 8)
    return DistillingDetectionModule(small_detector(), sgd, teacher=teacher, temperature=2.0, alpha=alpha, **more)


def batch():
    data = Squares(batch_size=6)
    data.setup()
    images, targets = next(iter(data.train_dataloader()))
    return data.transform(images), targets


def test_the_loss_is_weighted_between_the_labels_and_the_teacher():
    distilling, (images, targets) = module(alpha=0.3), batch()
    outputs = distilling.model(images)
    parts = distilling.parts_of_loss(images, outputs, targets)
    teacher = small_detector(1 / 8).eval()
    own = distilling.model.loss(outputs, targets, (64, 64))
    soft = distilling.model.distilled(outputs, teacher(images), (64, 64), 2.0)
    assert parts.keys() == {*own, *(f"teacher_{key}" for key in soft)}
    for key, value in own.items():
        torch.testing.assert_close(parts[key], 0.7 * value)
    for key, value in soft.items():
        torch.testing.assert_close(parts[f"teacher_{key}"], 0.3 * value)
        assert value > 0


def test_the_teacher_stays_as_it_is_and_outside():
    distilling = module(sparsity=0.01)
    make_trainer().fit(distilling, datamodule=Squares(batch_size=6))
    (teacher,) = distilling._held
    assert not teacher.training and all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    for key, value in small_detector(1 / 8).state_dict().items():
        assert torch.equal(teacher.state_dict()[key], value)
    plain = DetectionModule(small_detector(), sgd, sparsity=0.01)
    assert distilling.state_dict().keys() == plain.state_dict().keys()
    assert len(list(distilling.parameters())) == len(list(plain.parameters()))


def test_what_is_logged_adds_up():
    distilling, trainer = module(), make_trainer()
    trainer.fit(distilling, datamodule=Squares(batch_size=6))
    logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
    parts = ("box", "objectness", "classes")
    assert logged["train/loss"] == pytest.approx(
        sum(logged[f"train/{who}{part}"] for who in ("", "teacher_") for part in parts), rel=1e-5
    )


def test_a_teacher_without_weight_changes_nothing():
    trained = []
    for learning in (module(alpha=0.0), DetectionModule(small_detector(), sgd)):
        make_trainer(limit_val_batches=0).fit(learning, datamodule=Squares(batch_size=6))
        trained.append(learning.model.state_dict())
    assert all(torch.equal(value, trained[1][key]) for key, value in trained[0].items())


def test_the_teacher_alone_brings_the_network_nearer_to_it():
    distilling, (images, targets) = module(alpha=1.0), batch()
    distilling._held[0].coarse[1].bias.data.fill_(1.0)  # it sees objects everywhere
    losses = []
    for _ in range(2):
        parts = distilling.parts_of_loss(images, distilling.model(images), targets)
        losses.append(sum(parts.values()))
        make_trainer(max_epochs=5, limit_val_batches=0).fit(distilling, datamodule=Squares(batch_size=6))
        distilling.train()
    assert losses[1] < 0.6 * losses[0]


def test_the_teacher_runs_in_the_precision_of_the_training():
    seen = []
    distilling = module()
    distilling._held[0].register_forward_hook(lambda net, given, outputs: seen.append(outputs[0].dtype))
    for precision in ("bf16-mixed", "64-true"):
        make_trainer(precision=precision, limit_val_batches=0, limit_train_batches=1).fit(
            distilling, datamodule=Squares(batch_size=6)
        )
    assert seen == [torch.bfloat16, torch.float64]


def test_detectors_that_say_something_else_are_refused():
    student = small_detector()
    check_same_layout("t.ckpt", small_detector(1 / 8), student)
    tiny = {"width": 1 / 16, "in_channels": 1}
    for teacher, words in (
        (models.yolov3_tiny(**tiny, num_classes=3, image_size=64), "classes=3, the network to train with classes=2"),
        (models.yolov3_tiny(**tiny, num_classes=2, image_size=96), "priors=.*they cannot be compared"),
        (models.yolov3(**tiny, num_classes=2, image_size=64), r"strides=\(32, 16, 8\)"),
        (models.vgg(widths=[4], num_classes=2, in_channels=1), "distill.teacher=t.ckpt, VGG, is not a detector"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_same_layout("t.ckpt", teacher, student)
    with pytest.raises(ConfigError, match="the network to train, Sequential, is not a detector"):
        check_same_layout("t.ckpt", student, nn.Sequential())
