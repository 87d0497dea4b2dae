"""Detectors, pruned at several ratios: the raw outputs equal those of the masked network, in eval and in train mode."""

import pytest
import torch
from exactness import assert_exact, empty_sides, randomise
from torchvision.models import resnet
from torchvision.models.detection import faster_rcnn, fcos, retinanet

import slimming
from slimming import models
from slimming.channels.options import PlanOptions
from slimming.channels.repair import refit

TIES = PlanOptions.__dataclass_fields__["ties"].metadata["allowed"]["choices"]
SMALL = {"width": 1 / 16, "num_classes": 3, "image_size": 64}


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("name", ["yolov3", "yolov3_tiny"])
def test_pruned_equals_masked(name, ties):
    torch.manual_seed(0)
    model, example = randomise(models.build(name, **SMALL)).eval(), torch.randn(1, 3, 64, 64).double()
    graph = slimming.trace(model, example, strict=True)  # every operator is understood
    for ratio in (0.3, 0.6, 0.9):
        plan = graph.plan(slimming.GlobalRatio(ratio), ties=ties)
        assert plan.got["removed"] > 0
        assert not empty_sides(assert_exact(model, plan, example))


def test_every_gamma_of_yolov3_is_a_candidate():
    """Its residual streams tie gammas, and its outputs have no BatchNorm: nothing has to stay."""
    model = models.yolov3(**SMALL)
    graph = slimming.trace(model, torch.zeros(1, 3, 64, 64), strict=True)
    for ties in ("together", "apart"):
        assert graph.candidates(ties).sum() == sum(
            m.num_features for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "blocks", "in_heads"),
    [
        ("fcos_resnet50_fpn", [1, 1, 1, 1], 8),
        pytest.param("fcos_resnet50_fpn", [3, 4, 6, 3], 8, marks=pytest.mark.complete),
        ("retinanet_resnet50_fpn_v2", [1, 1, 1, 1], 8),
        ("ssdlite320_mobilenet_v3_large", None, 12),
    ],
)
def test_torchvisions_detectors_train_and_are_pruned_exactly(name, blocks, in_heads, monkeypatch):
    """After twenty steps on two images, one of them without objects; every tie, the towers that five grids share included."""
    for module in (fcos, retinanet, faster_rcnn):
        monkeypatch.setattr(module, "resnet50", lambda **_: resnet.ResNet(resnet.Bottleneck, blocks))
    torch.manual_seed(0)
    model = models.torchvision_detection(name, num_classes=3, image_size=64)
    images = torch.randn(2, 3, 64, 64)
    targets = [{"boxes": torch.tensor([[5.0, 5, 40, 50]]), "labels": torch.tensor([1])}]
    targets.append({"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)})
    optimizer, losses = torch.optim.SGD(model.parameters(), 5e-3, 0.9), []
    for _ in range(20):
        parts = model.train().loss(model(images), targets, (64, 64))
        optimizer.zero_grad()
        sum(parts.values()).backward()
        optimizer.step()
        losses.append(sum(parts.values()).item())
    assert losses[-1] < losses[0] / 2
    model = randomise(model).eval()
    graph = slimming.trace(model, images[:1].double())
    assert not graph.train_reason
    towers = [n for n, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d) and ".head." in n]
    for ties in TIES:
        plan = graph.plan(slimming.GlobalRatio(0.5), ties=ties)
        assert len(set(towers) & set(plan.keep)) == len(towers) == in_heads
        assert_exact(model, plan, images[:1].double())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("fasterrcnn_resnet50_fpn", 0),
        ("fasterrcnn_resnet50_fpn_v2", 4),  # BatchNorms of the pyramid's outputs
        ("fasterrcnn_mobilenet_v3_large_fpn", 0),
        pytest.param("fasterrcnn_mobilenet_v3_large_320_fpn", 0, marks=pytest.mark.complete),
    ],
)
def test_two_stage_detectors_train_and_are_pruned_exactly(name, whole, monkeypatch):
    """Both networks see the same proposals, which must be some; after twenty steps, one of the images without objects."""
    model = two_stage(name, monkeypatch)
    images = torch.randn(2, 3, 64, 64)
    targets = [{"boxes": torch.tensor([[5.0, 5, 40, 50]]), "labels": torch.tensor([1])}]
    targets.append({"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)})
    optimizer, losses = torch.optim.SGD(model.parameters(), 5e-3, 0.9), []
    for _ in range(20):
        parts = model.train().loss(model(images, targets), targets, (64, 64))
        optimizer.zero_grad()
        sum(parts.values()).backward()
        optimizer.step()
        losses.append(sum(parts.values()).item())
    assert losses[-1] < losses[0] / 2
    example = images[:1].double()
    model = randomise(model).eval()
    assert len(model(example)["class_logits"]) > 5
    graph = slimming.trace(model, example)
    assert not graph.train_reason
    outputs = [n for n, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d) and ".layer_blocks." in n]
    for ties in TIES:
        plan = graph.plan(slimming.GlobalRatio(0.5), ties=ties)
        assert plan.compare == "layers" and len(outputs) == whole
        assert (ties == "apart") or not set(outputs) & set(plan.keep)
        slimming.prune(model, plan)
        assert_exact(model, plan, example)


@pytest.mark.slow
def test_repair_leaves_what_reads_proposals(monkeypatch):
    """Dense and thin network look at other ones: rows of one are not to be fitted to those of the other."""
    model = two_stage("fasterrcnn_resnet50_fpn", monkeypatch)
    images = torch.randn(6, 3, 64, 64)
    plan = slimming.trace(model, images[:1]).plan(slimming.GlobalRatio(0.5), score="random")
    thin = slimming.prune(model, plan)
    repaired = refit(model, thin, plan, [images])
    second = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert len(second) == 4 and repaired.left.keys() == second
    assert "net.rpn.head.cls_logits" in repaired.layers and not second & {*repaired.layers}
    for name in second:
        assert torch.equal(repaired.model.get_submodule(name).weight, thin.get_submodule(name).weight)


def two_stage(name, monkeypatch):
    """Return a detector with few layers and few proposals, which trains on fewer."""
    monkeypatch.setattr(faster_rcnn, "resnet50", lambda **_: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1]))
    torch.manual_seed(0)
    model = models.torchvision_detection(name, num_classes=3, image_size=64)
    model.net.rpn._pre_nms_top_n = model.net.rpn._post_nms_top_n = {"training": 20, "testing": 20}
    model.net.roi_heads.fg_bg_sampler.batch_size_per_image = 10
    return model
