"""task=detection through the stages: training, pruning, fine-tuning, the pipeline; and what it refuses."""

import dataclasses
import json
import math

import pytest
import torch

import slimming
from conftest import compose_config
from slimming import checkpoint, models, stages
from slimming.errors import ConfigError

SMALL = ("task=detection", "model=yolov3_tiny", "model.width=0.0625", "optimizer=adamw", "optimizer.lr=1e-3")
SMALL += ("trainer.max_epochs=2", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu", "data=digits")
SQUARES = {"_target_": "squares.Squares", "batch_size": 6, "eval_batch_size": 5}
PARTS = ("box", "objectness", "classes")


def on_squares(config, **more):
    """Return a configuration with the data of tests."""
    return dataclasses.replace(config, data=SQUARES | more)


def result(out):
    return json.loads((out / "result.json").read_text())


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    out = tmp_path_factory.mktemp("sparse")
    return stages.train(on_squares(compose_config(*SMALL, "sparsity=0.01"), val=6), out), out


def test_a_training_leaves_its_record(sparse, capsys):
    score, out = sparse
    found = result(out)
    metrics = found["metrics"]
    assert score == metrics["test/map50"] and 0 <= metrics["test/map"] <= score <= 1
    assert {f"train/{part}" for part in PARTS} <= set(metrics) and not any(key.endswith("/acc") for key in metrics)
    assert (found["model"], found["data"], found["config"]["task"], found["n_test"]) == (
        "yolov3_tiny",
        "squares",
        "detection",
        12,
    )
    assert metrics["val/map50_best"] >= metrics["val/map50"] and metrics["best_epoch"] in (1, 2)
    assert (out / "best.ckpt").exists() and (out / "curves.png").exists()
    record = checkpoint.read(out / "last.ckpt").record
    assert record.model["arguments"]["image_size"] == 64
    outputs = slimming.load(out / "last.ckpt")(torch.zeros(1, 1, 64, 64))
    assert [tuple(o.shape) for o in outputs] == [(1, 21, 2, 2), (1, 21, 4, 4)]


def prune(path, out, *overrides):
    values = (f"checkpoint={path}", "latency_batch=1", "calibrate.batches=2", "trainer.accelerator=cpu")
    return stages.prune(on_squares(compose_config(*values, *overrides, name="prune"), val=6), out)


@pytest.mark.parametrize("more", [["ratio=0.5"], ["budget.macs=0.5", "repair=true", "score=reconstruction"]])
def test_pruned_and_finetuned(sparse, tmp_path, capsys, more):
    before, out = sparse
    score = prune(out / "last.ckpt", tmp_path / "pruned", *more)
    found = result(tmp_path / "pruned")
    assert found["metrics"]["test/map50_before"] == pytest.approx(before) and score == found["metrics"]["test/map50"]
    assert found["cost"]["num_params"] < found["cost_before"]["num_params"] and found["task"] == "detection"
    assert "test mAP@0.5: " in capsys.readouterr().out
    tuning = compose_config(
        f"checkpoint={tmp_path / 'pruned' / 'pruned.ckpt'}", "trainer.max_epochs=1", name="finetune"
    )
    tuned = stages.finetune(on_squares(tuning), tmp_path / "tuned")
    assert tuned == result(tmp_path / "tuned")["metrics"]["test/map50"] and not math.isnan(tuned)
    assert result(tmp_path / "tuned")["config"]["task"] == "detection"


def test_from_scratch(sparse, tmp_path):
    prune(sparse[1] / "last.ckpt", tmp_path / "pruned", "ratio=0.5", "test=false")
    tuning = compose_config(f"checkpoint={tmp_path / 'pruned' / 'pruned.ckpt'}", "init=scratch", name="finetune")
    stages.finetune(on_squares(tuning), tmp_path / "scratch")
    assert result(tmp_path / "scratch")["role"] == "scratch"


def test_the_pipeline(tmp_path):
    setting = ("sparsity=0.01", "ratio=0.5", "calibrate.batches=2", "latency_batch=1", "finetune.distill=true")
    config = compose_config(*SMALL, *setting, name="slim")
    score = stages.slim(on_squares(config), tmp_path)
    metrics = result(tmp_path / "ratio-0.5" / "finetuned")["metrics"]
    assert score == metrics["test/map50"] and metrics["train/teacher_objectness"] > 0
    text = (tmp_path / "report.md").read_text()
    assert "test mAP@0.5 (%)" in text and "accuracy" not in text.lower() and "distilled" in text
    drawn = [tmp_path / run / "detections.png" for run in ("sparse", "ratio-0.5/pruned", "ratio-0.5/finetuned")]
    shown = sorted((tmp_path / "figures").glob("detections_*.png"))
    assert [p.read_bytes() for p in drawn] == [p.read_bytes() for p in shown] and all(p.name in text for p in shown)
    assert stages.slim(on_squares(config), tmp_path) == score  # all is there


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=detection", "model=vgg11"], "task=detection trains a detector, and VGG has no methods"),
        (["task=classification"], "YoloV3Tiny is a detector: give task=detection"),
        (["model.priors=[[1,2,3]]"], "model.priors=.* do not fit the 2 scales"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        stages.train(on_squares(compose_config(*SMALL, *overrides)), tmp_path)


def test_a_detector_on_images_with_classes_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="give data=boxes or data=scenes"):
        stages.train(compose_config(*SMALL), tmp_path)


def test_an_image_size_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="multiples of 32 pixels, got 40x40"):
        stages.train(compose_config(*SMALL, "data.image_size=40"), tmp_path)


def export(path, out, *overrides):
    return stages.export(on_squares(compose_config(f"checkpoint={path}", *overrides, name="export")), out)


@pytest.mark.slow
@pytest.mark.parametrize("more", [["format=torch", "test_images=0"], ["shape=none"]])
def test_boxes_out(sparse, tmp_path, capsys, more):
    """What an artefact gives are the boxes and scores that are detected from, as shares of the image."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    prune(sparse[1] / "last.ckpt", tmp_path / "pruned", "ratio=0.5", "test=false")
    export(tmp_path / "pruned" / "pruned.ckpt", tmp_path / "out", *more)
    facts = json.loads((tmp_path / "out" / "export.json").read_text())
    assert facts["output"]["name"] == "boxes" and facts["output"]["shape"] == ["batch", 3 * (2 * 2 + 4 * 4), 4 + 2]
    assert facts["accuracy"] is None and facts["parity"]["relative"] < 1e-4
    assert facts["parity"]["images"] == (32 if "test_images=0" in more else 12)
    assert "the boxes differ by" in capsys.readouterr().out
    if more == ["shape=none"]:
        import onnxruntime

        model = slimming.load(tmp_path / "pruned" / "pruned.ckpt")
        images = torch.randn(3, 1, 64, 64)
        session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
        (found,) = session.run(["boxes"], {"images": images.numpy()})
        with torch.inference_mode():
            boxes, scores = model.decoded(model(images), (64, 64))
        torch.testing.assert_close(torch.from_numpy(found[..., :4]) * 64, boxes, rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(torch.from_numpy(found[..., 4:]), scores, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("override", "message"),
    [("quantize=int8", "quantize=int8 is for classifiers"), ("format=safetensors", "boxes are what is exported")],
)
def test_exports_that_there_are_not_are_refused(sparse, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        export(sparse[1] / "last.ckpt", tmp_path, override)


STOP = "+callbacks.stop={_target_: test_train_stage.Stop, epoch: 0}"


def tune(path, out, *overrides):
    config = compose_config(f"checkpoint={path}", "trainer.max_epochs=2", *overrides, name="finetune")
    return stages.finetune(on_squares(config), out)


def test_finetuned_with_a_teacher_and_interrupted(sparse, tmp_path):
    prune(sparse[1] / "last.ckpt", tmp_path / "pruned", "ratio=0.5", "test=false")
    path, teacher = tmp_path / "pruned" / "pruned.ckpt", f"distill.teacher={sparse[1] / 'last.ckpt'}"
    score = tune(path, tmp_path / "a", teacher)
    found = result(tmp_path / "a")
    assert score == found["metrics"]["test/map50"] and found["metrics"]["train/teacher_box"] > 0
    distilled = found["config"]["finetune"]["distill"]
    assert (distilled["temperature"], distilled["alpha"]) == (1.0, 0.5)
    with pytest.raises(SystemExit):
        tune(path, tmp_path / "b", teacher, STOP)
    tune(path, tmp_path / "b", teacher, "resume=true")
    one, other = (checkpoint.read(tmp_path / run / "last.ckpt").content["state_dict"] for run in "ab")
    assert one.keys() == other.keys() == checkpoint.read(path).content["state_dict"].keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_classifier_is_no_teacher_of_a_detector(sparse, tmp_path):
    arguments = {"widths": [4], "num_classes": 2, "in_channels": 1}
    slimming.save(tmp_path / "t.ckpt", models.vgg(**arguments), dense={"name": "vgg", "arguments": arguments})
    with pytest.raises(ConfigError, match=r"t\.ckpt, VGG, is not a detector that learns from a teacher or teaches"):
        tune(sparse[1] / "last.ckpt", tmp_path / "run", f"distill.teacher={tmp_path / 't.ckpt'}")


def test_a_detector_of_another_layout_is_no_teacher(sparse, tmp_path):
    arguments = {"width": 0.05, "num_classes": 2, "in_channels": 1, "image_size": 64}
    dense = {"name": "yolov3", "arguments": arguments}
    slimming.save(tmp_path / "t.ckpt", models.yolov3(**arguments), dense=dense)
    with pytest.raises(ConfigError, match=r"strides=\(32, 16, 8\), the network to train with strides=\(32, 16\)"):
        tune(sparse[1] / "last.ckpt", tmp_path / "run", f"distill.teacher={tmp_path / 't.ckpt'}")
