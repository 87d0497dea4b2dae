"""export.py quantize=int8: which images it sees, what it leaves, what it refuses."""

import json
import re

import onnx
import pytest

from conftest import SMALL, compose_config
from slimming import stages
from slimming.data import Digits
from slimming.errors import ConfigError, DataError
from slimming.stages.quantising import images_for


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    stages.train(compose_config(*SMALL, "trainer.max_epochs=3"), out)
    return out / "last.ckpt"


def configured(*overrides):
    return compose_config("checkpoint=x", "quantize=int8", *overrides, name="export")


def test_an_int8_export_says_what_it_gives(trained, tmp_path, capsys):
    config = compose_config(f"checkpoint={trained}", "quantize=int8", "quantize.max_drop=100", name="export")
    accuracy = stages.export(config, tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "export.json").read_text())
    out = capsys.readouterr().out
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.onnx", "export.json", "result.json"}
    quantised = facts["quantize"]
    assert (quantised["to"], quantised["layers"], quantised["floats"]) == ("int8", 3, [])
    assert quantised["checked_on"] == "training images held out from the calibration"
    assert facts["accuracy"]["test/acc"] == accuracy
    before = facts["accuracy"]["test/acc_before"]
    assert f"test accuracy: {before:.2%} -> {accuracy:.2%} in int8" in out
    assert re.search(r"int8: static QDQ, S8S8 per channel, by onnxruntime, weights in \d bits", out)
    assert abs(before - accuracy) < 0.05
    assert facts["parity"]["relative"] < 1e-4 < quantised["relative"]


def test_values_of_the_quantisation_go_with_its_name():
    quantize = configured("quantize.max_drop=null", "quantize.batches=3").quantize
    assert (quantize.to, quantize.max_drop, quantize.batches) == ("int8", None, 3)
    assert compose_config("checkpoint=x", name="export").quantize.to is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("quantize=none", "quantize.max_drop=0.5"), r"quantize.<option> needs quantize=int8"),
        (("format=torch",), "quantize=int8 is for format=onnx and format=openvino, not for torch"),
        (("format=openvino", "quantize.symmetric=true"), "quantize.symmetric=true is for format=onnx"),
        (("quantize.max_drop=-1",), "quantize.max_drop must be a number >= 0"),
    ],
)
def test_values_that_mean_nothing_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        configured(*overrides)


def test_int8_without_data_says_what_to_give(trained, tmp_path):
    config = compose_config(
        f"checkpoint={trained}",
        "quantize=int8",
        "data=image_folder",
        "data.root=missing",
        "test_images=0",
        name="export",
    )
    with pytest.raises(
        DataError, match=r"quantize=int8, which calibrates on training images, needs the data: give data.root"
    ):
        stages.export(config, tmp_path)
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("val_size", [0, 100])
def test_what_calibrates_does_not_judge_and_neither_is_a_test_image(val_size):
    data = Digits(image_size=8, batch_size=32, val_size=val_size, crop=1)
    data.setup()
    calibration, check = images_for(configured("quantize.batches=4", "quantize.check_images=90").quantize, data)
    assert [len(images) for images in calibration] == [32] * 4
    assert sum(len(labels) for _, labels in check) == 90

    def keys(batches):
        return {image.tobytes() for batch in batches for image in batch}

    splits = {name: keys([data.transform(split.images).numpy()]) for name, split in data.splits.items()}
    assert keys(calibration) <= splits["train"]
    assert keys(images for images, _ in check) <= splits["val" if val_size else "train"]
    assert not keys(calibration) & keys(images for images, _ in check)
    again = images_for(configured("quantize.batches=4", "quantize.check_images=90").quantize, data)
    assert keys(again[0]) == keys(calibration)


def test_unchecked_needs_no_images_to_judge_by():
    data = Digits(image_size=8, batch_size=32)
    data.setup()
    assert images_for(configured("quantize.max_drop=null").quantize, data)[1] == []
