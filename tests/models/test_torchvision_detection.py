"""torchvision's detectors by name: their norms, raw outputs, losses and detections; and what is said of bad input."""

import re

import pytest
import torch
from torch import nn
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d, box_iou

import slimming
from slimming import models
from slimming.deploy import format_named
from slimming.deploy.capturing import Network
from slimming.deploy.engines import READS, open_engine
from slimming.deploy.proving import prove
from slimming.detection.exported import BoxesOut
from slimming.errors import ConfigError
from slimming.models.torchvision_detection import FAMILIES, TorchvisionDetector, replace_norms
from slimming.models.torchvision_two_stage import FasterRcnn
from slimming.records import Record
from slimming.training.distillation import check_same_layout

TWO_STAGE = tuple(name for name, family in FAMILIES.items() if issubclass(family, FasterRcnn))
ONE_STAGE = tuple(name for name in FAMILIES if name not in TWO_STAGE)
NAMES = (*ONE_STAGE, *TWO_STAGE)
TAUGHT = [name for name in NAMES if FAMILIES[name].distilled]
LOSSES = {"loss_objectness": "objectness", "loss_rpn_box_reg": "proposals"}  # torchvision's words -> ours
LOSSES |= {"loss_classifier": "classification", "loss_box_reg": "bbox_regression"}
IN_HEADS = {"fcos_resnet50_fpn": 8, "retinanet_resnet50_fpn_v2": 8, "ssdlite320_mobilenet_v3_large": 12}  # BatchNorms
SMALL = {"num_classes": 3, "image_size": 64}
NOTHING = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}


def build(name, proposals=20, sampled=10**6):
    """Return a network; a two-stage one with few proposals, all of which are taken unless fewer are sampled."""
    model = models.build("torchvision_detection", name=name, **SMALL)
    if name in TWO_STAGE:
        rpn, heads = model.net.rpn, model.net.roi_heads
        rpn._pre_nms_top_n = rpn._post_nms_top_n = {"training": proposals, "testing": proposals}
        rpn.fg_bg_sampler.batch_size_per_image = heads.fg_bg_sampler.batch_size_per_image = sampled
    return model


def call(model, images, targets):
    """Call a network as its training does."""
    return model(images, targets) if isinstance(model, FasterRcnn) else model(images)


@pytest.fixture(autouse=True)
def _light(monkeypatch):
    """ResNets of one narrow block per stage: the same code in a moment."""
    from torchvision.models import resnet
    from torchvision.models.detection import faster_rcnn, fcos, retinanet

    def small(*, norm_layer=nn.BatchNorm2d, **_):
        return resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], norm_layer=norm_layer)

    for module in (fcos, retinanet, faster_rcnn):
        monkeypatch.setattr(module, "resnet50", small)


@pytest.mark.parametrize("name", NAMES)
def test_every_norm_is_a_batchnorm_with_a_trainable_scale(name):
    model = models.build("torchvision_detection", name=name, **SMALL, gamma_init=0.5)
    norms = [m for m in model.modules() if type(m).__name__.endswith(("Norm", "Norm2d"))]
    assert norms and all(isinstance(m, nn.BatchNorm2d) and m.weight.requires_grad for m in norms)
    assert all((m.weight == 0.5).all() for m in norms)
    towers = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and ".head." in n]
    assert len(towers) == IN_HEADS.get(name, 0)


def test_frozen_ones_keep_their_values():
    frozen = FrozenBatchNorm2d(4, eps=1e-3)
    for number, buffer in enumerate((frozen.weight, frozen.bias, frozen.running_mean, frozen.running_var)):
        buffer.copy_(torch.rand(4) + number)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), frozen)
    x = torch.randn(2, 2, 5, 5)
    before = model(x)
    replace_norms(model)
    assert isinstance(model[1], nn.BatchNorm2d) and model[1].weight.requires_grad
    torch.testing.assert_close(model.eval()(x), before)


@pytest.mark.parametrize("size", [(64, 64), (97, 130)])
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_detections_are_torchvisions_own(name, size):
    """The same as its forward, told not to normalise or resize, at a size that no stride divides as well."""
    torch.manual_seed(0)
    model = build(name)
    images = torch.randn(2, 3, *size)
    targets = [{"boxes": torch.tensor([[5.0, 5, 40, 50], [30, 30, 60, 60]]), "labels": torch.tensor([1, 0])}, NOTHING]
    background = int(not name.startswith(("fcos", "retinanet")))  # counts as a class
    theirs = [target | {"labels": target["labels"] + background} for target in targets]
    net = model.net
    net.transform.normalize = lambda image: image
    net.transform.resize = lambda image, target=None: (image, target)
    net.transform.size_divisible = 1
    expected = {LOSSES.get(key, key): value for key, value in net.train()([*images], theirs).items()}
    found = model.loss(call(model, images, targets), targets, size)
    assert found.keys() == expected.keys()
    for key in found:
        torch.testing.assert_close(found[key], expected[key])
    model.eval()
    for ours, theirs in zip(model.detections(model(images), size), net([*images]), strict=True):
        assert len(ours["boxes"]) > 0
        theirs["labels"] -= background
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key])


@pytest.mark.parametrize("name", ONE_STAGE)
def test_perfect_outputs_are_decoded_to_the_target_and_cost_less_than_others(name):
    model, size = models.build("torchvision_detection", name=name, **SMALL), (64, 64)
    box = torch.tensor([6.0, 8, 44, 40])
    outputs = {key: torch.zeros_like(value) for key, value in model(torch.zeros(2, 3, *size)).items()}
    (anchors,) = model._anchors(outputs["cls_logits"], 1, size)
    in_fcos = torch.tensor([21.0, 20, 29, 28])  # the finest cell in the middle of an object is to find it
    best = int(box_iou((in_fcos if "bbox_ctrness" in outputs else box)[None], anchors).argmax())
    outputs["bbox_regression"][0, best] = encoded(model.net.box_coder, box[None], anchors[best : best + 1])
    outputs["cls_logits"].fill_(-20)
    outputs["cls_logits"][0, best, -1] = 20  # the last class
    if name.startswith("ssd"):
        outputs["cls_logits"][..., 0] = 0
    if "bbox_ctrness" in outputs:
        outputs["bbox_ctrness"].fill_(20)
    found, other = model.detections(outputs, size)
    assert found["labels"].tolist() == [2] and found["scores"].item() > 0.99 and not len(other["boxes"])
    torch.testing.assert_close(found["boxes"][0], box, rtol=1e-4, atol=1e-3)
    boxes, scores = model.decoded(outputs, size)
    torch.testing.assert_close(boxes[0, best], box, rtol=1e-4, atol=1e-3)
    assert scores[0].flatten().argmax() == best * 3 + 2
    targets = [[{"boxes": box[None], "labels": torch.tensor([label])}, NOTHING] for label in (2, 1)]
    right, wrong = (model.loss(outputs, own, size)["classification"] for own in targets)
    assert right < wrong


def encoded(coder, boxes, anchors):
    """Return the regression (n, 4) that a coder decodes to boxes."""
    if hasattr(coder, "encode_single"):
        return coder.encode_single(boxes, anchors)
    return coder.encode(anchors, boxes)  # FCOS


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_objects_gives_every_parameter_a_gradient(name):
    """Which several processes wait for."""
    model, targets = build(name), [NOTHING, NOTHING]
    parts = model.loss(call(model, torch.randn(2, 3, 64, 64), targets), targets, (64, 64))
    sum(parts.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_perfect_outputs_of_a_second_stage_are_the_target():
    model, size, box = build(TWO_STAGE[0]), (64, 64), torch.tensor([[6.0, 8, 44, 40]])
    outputs = model.eval()(torch.zeros(2, 3, *size))
    proposals = [torch.tensor([[0.0, 0, 30, 30], [8.0, 10, 50, 44]]), torch.tensor([[0.0, 0, 50, 50]])]
    logits, boxes = torch.zeros(3, 4), torch.zeros(3, 16)
    logits[:, 0] = 20  # nothing but the background
    logits[1] = torch.tensor([0.0, 0, 0, 20])  # the last class
    (boxes[1, 12:],) = model.net.roi_heads.box_coder.encode([box], [proposals[0][1:]])[0]
    outputs |= {"proposals": proposals, "class_logits": logits, "box_regression": boxes}
    found, other = model.detections(outputs, size)
    assert found["labels"].tolist() == [2] and found["scores"].item() > 0.99 and not len(other["boxes"])
    torch.testing.assert_close(found["boxes"], box, rtol=1e-4, atol=1e-3)
    targets = [{"boxes": box, "labels": torch.tensor([2])}, NOTHING]
    parts = model.loss(outputs, targets, size)
    assert parts["classification"] < 1e-3 and parts["bbox_regression"] < 1e-3
    targets[0]["labels"] -= 1
    assert model.loss(outputs, targets, size)["classification"] > 1


def test_a_second_stage_trains_on_a_sample_that_holds_the_objects():
    torch.manual_seed(0)
    model, images, box = (
        build(TWO_STAGE[3], proposals=60, sampled=12),
        torch.randn(2, 3, 64, 64),
        torch.tensor([[9.0, 9, 41, 40]]),
    )
    targets = [{"boxes": box, "labels": torch.tensor([1])}, NOTHING]
    outputs = model(images, targets)
    assert [len(own) for own in outputs["proposals"]] == [12, 12] and len(outputs["class_logits"]) == 24
    assert (outputs["proposals"][0] == box).all(1).any()
    calls = []
    model.net.roi_heads.subsample = lambda labels: (
        calls.append(own := type(model.net.roi_heads).subsample(model.net.roi_heads, labels)) or own
    )
    model.loss(outputs, targets, (64, 64))
    assert [own.tolist() for own in calls[0]] == [[*range(12)]] * 2  # sampled already
    assert [len(own) for own in model(images)["proposals"]] == [12, 12]  # no targets: as many
    outputs = model.eval()(images)
    assert min(len(own) for own in outputs["proposals"]) > 12
    assert all(part.isfinite() for part in model.loss(outputs, targets, (64, 64)).values())


@torch.no_grad()
def test_an_image_without_proposals_adds_nothing_to_the_second_stage():
    """As after a training that has driven all boxes out of the image."""
    model, images, size = build("fasterrcnn_resnet50_fpn").eval(), torch.rand(2, 3, 64, 64), (64, 64)
    targets = [{"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([n])} for n in (0, 2)]
    found, alone = model(images), model.loss(model(images[1:]), targets[1:], size)
    first = len(found["proposals"][0])
    found["proposals"][0] = found["proposals"][0][:0]
    found |= {key: found[key][first:] for key in ("class_logits", "box_regression")}
    for key in ("classification", "bbox_regression"):
        torch.testing.assert_close(model.loss(found, targets, size)[key], alone[key])
    model.net.rpn.min_size = 1e9
    nothing = model(images)
    assert (
        [len(own) for own in nothing["proposals"]]
        == [len(d["boxes"]) for d in model.detections(nothing, size)]
        == [0, 0]
    )
    parts = model.loss(nothing, targets, size)
    assert float(parts["classification"]) == float(parts["bbox_regression"]) == 0
    assert all(bool(part.isfinite()) for part in parts.values())


def test_a_two_stage_detector_is_not_exported():
    with pytest.raises(
        ConfigError, match="FasterRcnn is not exported, as how many boxes it has depends on the images; yolov3"
    ):
        BoxesOut(build(TWO_STAGE[0]))


@pytest.mark.parametrize("size", [1, 33, 100, 320])
def test_ssdlite_takes_images_of_any_size(size):
    name = "ssdlite320_mobilenet_v3_large"
    model = models.build("torchvision_detection", name=name, num_classes=3, image_size=size).eval()
    images = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        outputs = model(images)
        boxes, scores = model.decoded(outputs, (size, size))
    assert boxes.shape[:2] == scores.shape[:2] == outputs["cls_logits"].shape[:2] and scores.shape[2] == 3
    (anchors,) = model._anchors(boxes, 1, (size, size))
    assert len(anchors) == boxes.shape[1] and (anchors >= -size).all() and (anchors <= 2 * size).all()


def test_another_number_of_colours():
    model = models.build("torchvision_detection", name=NAMES[0], **SMALL, in_channels=1).eval()
    assert model(torch.randn(1, 1, 64, 64))["cls_logits"].shape == (1, 8 * 8 + 4 * 4 + 2 * 2 + 1 + 1, 3)


def test_weights_come_from_a_file(tmp_path):
    theirs = detection.fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    ours = models.build(
        "torchvision_detection", name="fcos_resnet50_fpn", **SMALL, weights=str(tmp_path / "weights.pt")
    )
    own, given = ours.net.state_dict(), theirs.state_dict()
    assert torch.equal(own["backbone.body.conv1.weight"], given["backbone.body.conv1.weight"])
    assert torch.equal(own["head.regression_head.conv.0.weight"], given["head.regression_head.conv.0.weight"])
    assert own["head.classification_head.cls_logits.weight"].shape[0] == 3
    spec = models.spec("torchvision_detection", {"name": "fcos_resnet50_fpn", "weights": "weights.pt"})
    assert spec["arguments"]["weights"] is None  # a checkpoint does not need them again


@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "fasterrcnn_resnet50_fpn"])
def test_weights_of_cocos_90_classes_fit_whole(name, tmp_path):
    """torchvision counts the background among its 91, as these heads do. Its older files name some layers otherwise."""
    theirs = getattr(detection, name)(weights=None, weights_backbone=None)
    older = {re.sub(r"(_blocks\.\d|rpn\.head\.conv)(\.0)+", r"\1", k): v for k, v in theirs.state_dict().items()}
    assert (older.keys() != theirs.state_dict().keys()) == (name in TWO_STAGE)
    for number, given in enumerate((theirs.state_dict(), older)):
        path = tmp_path / f"{number}.pt"
        torch.save(given, path)
        ours = models.build("torchvision_detection", name=name, num_classes=90, weights=str(path)).net.state_dict()
        assert all(torch.equal(ours[key], value) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "fcos_resnet50"}, "did you mean fcos_resnet50_fpn"),
        (
            {"name": "yolo"},
            "is not a detector of torchvision that is served; there are fcos_resnet50_fpn",
        ),
        (
            {"name": "ssd300_vgg16"},
            "model.name=ssd300_vgg16 is not served: it has no BatchNorm whose scales could be penalised; there are fcos_",
        ),
        ({"name": NAMES[0], "num_classes": 0}, "num_classes .* got 0"),
        ({"name": NAMES[0], "weights": "DEFAULT"}, "model.weights=DEFAULT is not a file"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, message):
    with pytest.raises(ConfigError, match=message):
        models.build("torchvision_detection", **arguments)


def test_a_file_that_is_something_else(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match="is not a state dict of fcos_resnet50_fpn: no weight of its backbone fits"):
        models.build("torchvision_detection", name=NAMES[0], weights=str(tmp_path / "weights.pt"))
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(ConfigError, match=r"text\.pt is not a state dict"):
        models.build("torchvision_detection", name=NAMES[0], weights=str(tmp_path / "text.pt"))


def test_a_detector_is_what_the_tasks_ask_for():
    assert all(callable(getattr(TorchvisionDetector, name)) for name in ("loss", "detections"))


@pytest.mark.parametrize("name", [*ONE_STAGE[:-1], pytest.param(ONE_STAGE[-1], marks=pytest.mark.slow)])
def test_what_is_decoded_for_other_engines_is_what_is_detected_from(name):
    torch.manual_seed(0)
    model = models.build("torchvision_detection", name=name, **SMALL).eval()
    images = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        outputs = {key: torch.randn_like(value) for key, value in model(images).items()}
        boxes, scores = model.decoded(outputs, (64, 64))
        found = model.detections(outputs, (64, 64))
    for own, box, score in zip(found, boxes, scores, strict=True):
        best = score.amax(1).argmax()
        torch.testing.assert_close(own["scores"][0], score.max())
        torch.testing.assert_close(own["boxes"][0], box[best].clamp(0, 64))
    program = torch.export.export(
        BoxesOut(model), (images,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
    )
    torch.testing.assert_close(program.module()(images[:2]), BoxesOut(model)(images[:2]))


@pytest.mark.complete
def test_ssdlite_as_onnx(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    model = models.build("torchvision_detection", name="ssdlite320_mobilenet_v3_large", num_classes=3, image_size=96)
    images = torch.randn(5, 3, 96, 96)
    model = slimming.calibrate(model, [images])
    graph = slimming.trace(model, images[:1])
    thin = BoxesOut(slimming.prune(model, graph.plan(slimming.GlobalRatio(0.5), ties="apart", score="random"))).eval()
    format_named("onnx").write(Network(thin, (3, 96, 96), Record(None)), tmp_path / "model.onnx")
    batches = [(images[:n], None) for n in (1, 5)]
    assert prove(open_engine(tmp_path / "model.onnx", READS[".onnx"][0]), thin, batches).relative < 1e-5


def raw_of_two(name):
    """Return a network, its raw outputs as leaves, and those of another network of its kind."""
    torch.manual_seed(0)
    student, teacher = (models.build("torchvision_detection", name=name, **SMALL).eval() for _ in range(2))
    assert student.layout() == teacher.layout()
    with torch.no_grad():
        outputs, others = (net(torch.randn(2, 3, 64, 64)) for net in (student, teacher))
    for key, scale in (("cls_logits", 2.0), ("bbox_regression", 0.2), ("bbox_ctrness", 2.0)):
        for raw in (outputs, others):
            if key in raw:
                raw[key] = raw[key] + scale * torch.rand_like(raw[key])
    return student, {key: value.clone().requires_grad_() for key, value in outputs.items()}, others


@pytest.mark.parametrize("name", TAUGHT)
def test_nothing_is_learned_from_a_teacher_that_says_the_same(name):
    student, outputs, _ = raw_of_two(name)
    parts = student.distilled(outputs, {key: value.detach() for key, value in outputs.items()}, (64, 64), 4.0)
    centres = {"bbox_ctrness"} if "fcos" in name else set()
    assert set(parts) == {"objectness", "classification", "bbox_regression"} | centres
    assert all(value.item() == pytest.approx(0, abs=1e-5) for value in parts.values())
    sum(parts.values()).backward()
    assert all(value.grad.abs().max() < 1e-6 for value in outputs.values())


@pytest.mark.parametrize("name", TAUGHT)
def test_the_teachers_background_teaches_that_it_is_background_alone(name):
    """One prediction has an object; elsewhere the teacher is sure that there is none: only the likeliest class learns it."""
    student, outputs, others = raw_of_two(name)
    others["cls_logits"] = torch.full_like(others["cls_logits"], -200.0)
    others["cls_logits"][1, 7, 2] = 3.0
    parts = student.distilled(outputs, others, (64, 64), 1.0)
    likeliest = nn.functional.one_hot(outputs["cls_logits"].argmax(-1), 3).bool()
    (gradient,) = torch.autograd.grad(parts.pop("objectness"), outputs["cls_logits"], retain_graph=True)
    assert (gradient[likeliest] != 0).all() and not gradient[~likeliest].any()
    sum(parts.values()).backward(retain_graph=True)
    for raw in outputs.values():
        assert raw.grad[1, 7].any()
        assert raw.grad.count_nonzero() == raw.grad[1, 7].count_nonzero()
    logit = outputs["cls_logits"][1, 7]
    chance, wanted = logit.sigmoid(), others["cls_logits"][1, 7].sigmoid()
    by_hand = wanted.xlogy(wanted / chance) + (1 - wanted).xlogy((1 - wanted) / (1 - chance))
    torch.testing.assert_close(parts["classification"], wanted[2] * by_hand.sum())


def test_what_they_say_means_the_same_where_kind_and_classes_are_the_same():
    layouts = [models.build("torchvision_detection", name=name, **SMALL).layout() for name in TAUGHT]
    assert layouts[0] != layouts[1] == layouts[2]
    other = models.build("torchvision_detection", name=TAUGHT[1], num_classes=4, image_size=96).layout()
    assert other == layouts[1] | {"classes": 4}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TAUGHT])
def test_others_do_not_teach(name):
    model = models.build("torchvision_detection", name=name, **SMALL)
    with pytest.raises(ConfigError, match="is not a detector that learns from a teacher"):
        check_same_layout("teacher.ckpt", model, model)
