"""Detectors, pruned at several ratios: the raw outputs equal those of the masked network, in eval and in train mode."""

import pytest
import torch
from exactness import assert_exact, empty_sides, randomise

import slimming
from slimming import models
from slimming.channels.options import PlanOptions

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
