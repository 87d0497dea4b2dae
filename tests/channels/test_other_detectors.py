"""The recipes of docs/detection.md for other people's detectors, where the packages are installed."""

import copy
import re
import sys

import pytest
import torch
from exactness import assert_exact, randomise

import slimming
from conftest import ROOT
from slimming.channels.layers import SelectBatchNorm
from slimming.channels.proof import relative_difference

IMAGE = torch.randn(1, 3, 64, 64, dtype=torch.float64)
ULTRALYTICS = ("yolov3-tiny", "yolov5n", "yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo26n")
LIBREYOLO = ("LibreYOLO9-t", "LibreYOLOX-s")
NAMES = ULTRALYTICS + LIBREYOLO
IN_PART = {"yolov10n": 0.95, "yolo26n": 0.95}  # share of the gammas that may go with ties together; all in the others


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    """The packages write no settings, download nothing, install nothing, and track nothing."""
    for name, value in {"CONFIG_DIR": str(tmp_path), "OFFLINE": "true", "AUTOINSTALL": "false"}.items():
        monkeypatch.setenv(f"YOLO_{name}", value)
    monkeypatch.chdir(tmp_path)


def recipe(package: str) -> str:
    """Return the code of a recipe."""
    page = (ROOT / "docs" / "detection.md").read_text()
    (code,) = [
        block for block in re.findall(r"```text\n(.*?)```", page, re.DOTALL) if f"from {package} import" in block
    ]
    return code


def without_features(network):
    """Wrap a network as the recipe for ultralytics does."""
    classes = re.search(r"^class Outputs.*?(?=^class ThinTrainer)", recipe("ultralytics"), re.DOTALL | re.MULTILINE)[0]
    names = {"torch": torch}
    exec(classes, names)
    return names["Outputs"](network)


def network_of(name: str) -> torch.nn.Module:
    """Build a detector with random weights; it returns no feature maps."""
    torch.manual_seed(0)
    if name in LIBREYOLO:
        family, _, size = name.partition("-")
        network = getattr(pytest.importorskip("libreyolo"), family)(None, size=size, device="cpu").model
        network.head.export = True
        return network
    tasks = pytest.importorskip("ultralytics.nn.tasks")
    return without_features(tasks.DetectionModel(f"{name}.yaml", verbose=False))


@pytest.mark.parametrize("name", NAMES)
def test_pruned_equals_masked(name):
    share = IN_PART.get(name, 1)
    model = randomise(network_of(name).requires_grad_(True))
    graph = slimming.trace(model, IMAGE)
    gammas = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    for ties, may_go in (("together", share), ("apart", 1.0)):
        assert int(graph.candidates(ties).sum()) >= int(may_go * gammas)
        plan = graph.plan(slimming.GlobalRatio(0.5), ties=ties)
        thin = assert_exact(model, plan, IMAGE)
        assert plan.got["removed"] > 0.45 * may_go * gammas
        if ties == "together" and share == 1:
            assert not any(isinstance(module, SelectBatchNorm) for module in thin.modules())
    thin = assert_exact(model, graph.plan(slimming.GlobalRatio(0.3), ties="aligned"), IMAGE)
    assert not any(isinstance(module, SelectBatchNorm) for module in thin.modules())


@pytest.fixture
def boxes(tmp_path):
    """A YOLO-format folder with a few images."""
    sys.path.append(str(ROOT / "tests" / "data"))
    from test_boxes import line, picture

    for part, count in (("train", 8), ("val", 4)):
        for i in range(count):
            box, size = (10, 12, 40, 44), (64, 48)
            picture(tmp_path / "boxes/images" / part / f"{i}.png", size, box)
            (tmp_path / "boxes/labels" / part).mkdir(parents=True, exist_ok=True)
            (tmp_path / "boxes/labels" / part / f"{i}.txt").write_text(line(i % 2, box, size))
    root = tmp_path / "boxes"
    (root / "data.yaml").write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames: {{0: cat, 1: dog}}\n")
    return root


def run(code: str, changes: dict[str, str]) -> dict:
    """Run a recipe with smaller numbers; returns its names."""
    for old, new in changes.items():
        assert old in code, old
        code = code.replace(old, new)
    names: dict = {}
    exec(compile(code, "docs/detection.md", "exec"), names)
    return names


@pytest.mark.slow
def test_the_recipe_for_libreyolo(boxes):
    pytest.importorskip("libreyolo")
    few = {"640": "64", "batch_size=16": "batch_size=4, num_workers=0", 'size="t"': 'size="t", device="cpu"'}
    trainer = 'accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=1'
    few |= {"max_epochs=100": trainer, "max_epochs=50": trainer}
    names = run(recipe("libreyolo"), few)
    thin, image = names["thin"], torch.rand(1, 3, 64, 64)
    assert names["plan"].got["ratio"] > 0.4 and names["yolo"].model is thin
    assert names["yolo"](str(next(boxes.rglob("*.png")))) is not None
    dense = names["LibreYOLO9"](None, size="t", nb_classes=2, device="cpu").model
    again = slimming.load("thin.ckpt", model=dense)
    assert torch.equal(again.eval()(image)["predictions"], thin(image)["predictions"])


@pytest.mark.slow
def test_the_recipe_for_ultralytics(boxes):
    pytest.importorskip("ultralytics")
    places = f'data="{boxes / "data.yaml"}", project="{boxes.parent / "runs"}"'  # else below the package's folder
    few = {"640": "64", 'data="data.yaml"': places + ', batch=4, workers=0, plots=False, device="cpu"'}
    few |= {"epochs=100": "epochs=1", "epochs=50": "epochs=1"}
    names = run(recipe("ultralytics"), few)
    thin, image = names["thin"], torch.rand(1, 3, 64, 64)
    assert names["plan"].got["ratio"] > 0.4
    trained = names["yolo"].model.float()
    assert [p.shape for p in trained.parameters()] == [p.shape for p in thin.parameters()]
    fused = copy.deepcopy(trained).eval().fuse(verbose=False)
    with torch.no_grad():
        expected = trained.eval()(image)[0]
        assert relative_difference([expected], [fused(image)[0]]) < 1e-4
    session = pytest.importorskip("onnxruntime").InferenceSession(names["yolo"].trainer.best.with_suffix(".onnx"))
    found = session.run(None, {session.get_inputs()[0].name: image.numpy()})[0]
    assert relative_difference([expected], [torch.from_numpy(found)]) < 1e-4
