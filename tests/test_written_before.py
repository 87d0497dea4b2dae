"""Files that earlier versions wrote: checkpoints, plans and records keep their meaning.

They were written at plan format 2 and checkpoint format 1: a pre-activation ResNet on digits, sparse -> pruned (apart) ->
fine-tuned -> pruned again (together); and plans of `Residual` with placements, one of a network pruned before.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

import slimming
from conftest import compose_config
from residual import Residual
from slimming import checkpoint
from slimming.channels.plan import PruningPlan
from slimming.errors import RunDirectoryError

FOLDER = Path(__file__).parent / "written_before"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.mark.parametrize("path", EXPECTED)
def test_a_checkpoint_computes_what_it_computed(path):
    network = slimming.load(FOLDER / path)
    size = checkpoint.read(FOLDER / path).content["slimming"]["data"]["image_size"]
    x = torch.linspace(-1, 1, 2 * size**2).view(2, 1, size, size)
    with torch.inference_mode():
        torch.testing.assert_close(network(x), torch.tensor(EXPECTED[path]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("before, after", [("sparse/last.ckpt", "pruned"), ("finetuned/last.ckpt", "again")])
def test_a_plan_leads_to_the_network_that_it_led_to(before, after):
    plan = PruningPlan.from_json((FOLDER / after / "plan.json").read_text())
    thin = slimming.prune(slimming.load(FOLDER / before), plan)
    was = slimming.load(FOLDER / after / "pruned.ckpt")
    assert {k: v.shape for k, v in thin.state_dict().items()} == {k: v.shape for k, v in was.state_dict().items()}
    for one, other in zip(thin.parameters(), was.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["residual.json", "residual_format_1.json"])
def test_a_plan_with_placements(name):
    torch.manual_seed(1)
    network = Residual().eval()
    thin = slimming.prune(network, PruningPlan.from_json((FOLDER / name).read_text()))  # proves itself
    assert [*thin.state_dict()] == [*network.state_dict()]
    assert thin.conv1.out_channels == 5 and thin.conv2.in_channels == 6
    again = slimming.prune(thin, PruningPlan.from_json((FOLDER / "residual_again.json").read_text()))
    assert again.conv2.out_channels < thin.conv2.out_channels


def test_a_run_goes_on_and_its_checkpoints_are_pruned_and_trained_further(tmp_path):
    from slimming import stages

    shutil.copytree(FOLDER, tmp_path / "before")
    run = tmp_path / "before" / "sparse"
    network = ("model=preresnet20", "model.depth=11", "model.width=0.25", "data=digits", "sparsity=1e-3")
    network += ("trainer.limit_train_batches=2", "trainer.limit_test_batches=1", "resume=true")
    with pytest.raises(RunDirectoryError, match="max_epochs was 2, is 3"):
        stages.run_on_devices("train", compose_config(*network, "trainer.max_epochs=3"), run)
    before = json.loads((run / "result.json").read_text())
    (run / "result.json").unlink()
    stages.run_on_devices("train", compose_config(*network, "trainer.max_epochs=2"), run)
    after = json.loads((run / "result.json").read_text())
    assert after["metrics"] == before["metrics"] and after["history"] == before["history"]

    options = ("latency_batch=0", "calibrate.batches=1", "trainer.limit_test_batches=1", "ratio=0.2")
    for source in ("sparse/last.ckpt", "again/pruned.ckpt"):
        chosen = compose_config(f"checkpoint={tmp_path / 'before' / source}", *options, name="prune")
        stages.prune(chosen, tmp_path / source.replace("/", "_"))
    tuned = compose_config(f"checkpoint={FOLDER / 'pruned/pruned.ckpt'}", "trainer.max_epochs=1", name="finetune")
    stages.run_on_devices("finetune", tuned, tmp_path / "tuned")
    result = json.loads((tmp_path / "tuned/result.json").read_text())
    recorded = json.loads((FOLDER / "finetuned/result.json").read_text())["config"]
    assert [result["config"][k] for k in ("optimizer", "data")] == [recorded[k] for k in ("optimizer", "data")]


def test_a_report_of_old_records(tmp_path):
    from slimming import stages

    shutil.copytree(FOLDER, tmp_path / "runs")
    stages.report(compose_config(f"runs={tmp_path / 'runs'}", name="report"), tmp_path / "out")
    text = (tmp_path / "runs" / "report.md").read_text()
    for role in ("sparse", "pruned", "fine-tuned"):
        assert role in text
