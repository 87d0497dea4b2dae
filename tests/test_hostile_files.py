"""A checkpoint is data from anywhere: whatever it claims, loading it gives one error of ours, at once and in little memory."""

import copy
import os
import resource
import socket
import time
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

import slimming
from conftest import compose_config
from slimming import checkpoint, models, reference
from slimming.channels.plan import fingerprint
from slimming.errors import CheckpointError, ConfigError, PlanError
from slimming.stages.resuming import resume_point

ARGUMENTS = {"widths": [8, "M", 8], "num_classes": 3}
OURS = (CheckpointError, ConfigError, PlanError)
HUGE = 2**60
SECONDS, BYTES = 10, 300e6  # of any refusal


def dense():
    torch.manual_seed(0)
    return models.vgg(**ARGUMENTS).eval()


def content(network=None, **record):
    base = {"format": 1, "model": {"name": "vgg", "arguments": dict(ARGUMENTS)}, "plans": []}
    base |= {"data": {"num_classes": 3, "in_channels": 3, "image_size": 32, "mean": None, "std": None}}
    base |= {"config": {"seed": 1, "trainer": {"max_epochs": 2}}, "stage": "train", "metrics": {"test/acc": 0.5}}
    state = {f"model.{k}": v for k, v in (network or dense()).state_dict().items()}
    return {"state_dict": state, "slimming": base | record}


def pruned(change=lambda plan: None):
    """Return the content of a pruned network's checkpoint, its plan changed."""
    net = dense()
    nn.init.uniform_(net.feature[1].weight)
    plan = slimming.trace(net, torch.zeros(1, 3, 8, 8)).plan(slimming.GlobalRatio(0.4))
    thin, data = slimming.prune(net, plan), copy.deepcopy(plan.to_dict())
    change(data)
    return content(thin, plans=[data])


def with_model(kind="vgg", /, **arguments):
    return content(model={"name": kind, "arguments": arguments})


def with_weight(tensor, name="model.classifier.bias"):
    made = content()
    made["state_dict"][name] = tensor
    return made


def in_plan(**values):
    return lambda: pruned(lambda plan: plan.update(values))


def in_layer(name="feature.1", **values):
    return lambda: pruned(lambda plan: plan["layers"][name].update(values))


def moved_layer(old, new):
    return lambda: pruned(lambda plan: plan["layers"].update({new: plan["layers"].pop(old)}))


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def laughs():
    value = [0] * 10
    for _ in range(30):
        value = [value] * 10
    return value


def circle():
    value = []
    value.append(value)
    return value


def big_before_pruning():
    """A plan that fits its file in every shape, of a dense network of 40 GB."""
    with torch.device("meta"):
        net = models.vgg(widths=[100_000, 11_000], num_classes=3)
    layers = {}
    for name, kind, size, ins, outs in (
        ("feature.0", "conv", (3, 100_000), [0, 1, 2], [0]),
        ("feature.1", "norm", (100_000, 100_000), [0], [0]),
        ("feature.3", "conv", (100_000, 11_000), [0], [0]),
        ("feature.4", "norm", (11_000, 11_000), [0], [0]),
        ("classifier", "linear", (11_000, 3), [0], [0, 1, 2]),
    ):
        layers[name] = {"kind": kind, "ins": ins, "outs": outs, "size": size}
    plan = pruned()["slimming"]["plans"][0] | {"layers": layers, "fingerprint": fingerprint(net)}
    plan["keep"] = {"feature.1": [0], "feature.4": [0]}
    thin = models.vgg(widths=[1, 1], num_classes=3)
    made = content(thin, plans=[plan])
    made["slimming"]["model"]["arguments"] = {"widths": [100_000, 11_000], "num_classes": 3}
    return made


def shared_storage():
    """Every weight of a wide network a view of one small storage."""
    widths = [2**12] * 100
    with torch.device("meta"):
        net = models.mlp(widths=widths, image_size=1, num_classes=3)
    held = torch.zeros(2**24)
    made = content(model={"name": "mlp", "arguments": {"widths": widths, "image_size": 1, "num_classes": 3}})
    made["state_dict"] = {
        f"model.{k}": torch.zeros((), dtype=torch.int64) if not v.ndim else held[: v.numel()].view(v.shape)
        for k, v in net.state_dict().items()
    }
    return made


RECORDS = {
    # wrong types at every level
    "no model arguments": (lambda: content(model={"name": "vgg"}), "malformed: model"),
    "model a list": (lambda: content(model=["vgg"]), "malformed: model"),
    "model a number": (lambda: content(model=3), "malformed: model"),
    "name a number": (lambda: with_model(3), "malformed: model"),
    "name a list": (lambda: with_model(["vgg"]), "malformed: model"),
    "name a megabyte": (lambda: with_model("v" * 10**6), "malformed: model"),
    "zoo name a megabyte": (lambda: with_model("torchvision", name="v" * 10**6), "malformed: model"),
    "zoo name a list": (lambda: with_model("timm", name=["resnet10t"]), "malformed: model"),
    "arguments a list": (lambda: content(model={"name": "vgg", "arguments": [19]}), "malformed: model"),
    "arguments numbered": (lambda: content(model={"name": "vgg", "arguments": {1: 2}}), "keywords must be strings"),
    "format a tensor": (lambda: content(format=torch.ones(2)), "holds a Tensor"),
    "format a list": (lambda: content(format=[1]), "has format"),
    "a tensor in the config": (lambda: content(config={"a": [{"b": torch.ones(2)}]}), "holds a Tensor"),
    "a set": (lambda: content(metrics={"a": {1, 2}}), "holds a set"),
    "plans missing": (lambda: _without("plans"), "malformed: plans"),
    "plans a dict": (lambda: content(plans={"a": 1}), "malformed: plans"),
    "plans of numbers": (lambda: content(plans=[1]), "malformed: plans"),
    "plan empty": (lambda: content(plans=[{}]), "not a pruning plan"),
    "config a list": (lambda: content(config=[1]), "malformed: config"),
    "config group a string": (lambda: content(config={"trainer": "big"}), r"malformed: config\.trainer"),
    "config seed a word": (lambda: content(config={"seed": "one"}), r"malformed: config\.seed"),
    "config flag a word": (lambda: content(config={"channels_last": "yes"}), r"malformed: config\.channels_last"),
    "data a string": (lambda: content(data="cifar10"), "malformed: data"),
    "data without keys": (lambda: content(data={}), r"malformed: data\.num_classes"),
    "data a word": (lambda: content(data={"num_classes": 3, "in_channels": "3", "image_size": 4}), "in_channels"),
    "data huge": (lambda: content(data={"num_classes": 3, "in_channels": 3, "image_size": 2**20}), "image_size"),
    "metrics a list": (lambda: content(metrics=[1]), "malformed: metrics"),
    "stage a number": (lambda: content(stage=3), "malformed: stage"),
    "nested deep": (lambda: content(config={"a": nested(400)}), "levels deep"),
    "lists of the same lists": (lambda: content(config={"a": laughs()}), "would unfold"),
    "a list in itself": (lambda: content(config={"a": circle()}), "levels deep"),
    "a number of 300 digits": (lambda: content(config={"a": 10**300}), "more than 64 bits"),
    # networks that there are not
    "unknown model": (lambda: with_model("resnet1001"), "no model is registered"),
    "class as a model": (lambda: with_model("torch.nn.Linear", in_features=1), "no model is registered"),
    "unknown torchvision": (lambda: with_model("torchvision", name="resnet1001"), "not a torchvision"),
    "unknown timm": (lambda: with_model("timm", name="resnet1001"), "not a model of timm"),
    "hub of timm": (lambda: with_model("timm", name="hf-hub:timm/resnet18"), "not a model of timm"),
    "no zoo name": (lambda: with_model("torchvision"), "missing a required argument"),
    "extra argument": (lambda: with_model(colour="red"), "unexpected keyword"),
    "weights of a vgg": (lambda: with_model(weights="DEFAULT"), "unexpected keyword"),
    "_target_ argument": (lambda: with_model(_target_="os.system"), "unexpected keyword"),
    "_target_ deep": (lambda: with_model(width={"_target_": "os.system", "a": "mkdir evil"}), "width must be"),
    "_target_ in widths": (lambda: with_model(widths=[{"_target_": "os.system"}]), "widths"),
    # values that cannot be
    "width as a word": (lambda: with_model(width="1.0"), "width must be"),
    "width nan": (lambda: with_model(width=float("nan")), "width must be"),
    "width negative": (lambda: with_model(width=-1), "width must be"),
    "width infinite": (lambda: with_model(width=1e308), "no network is as it describes"),
    "depth a list": (lambda: with_model(depth=[19]), "depth must be"),
    "widths a number": (lambda: with_model(widths=5), "no network is as it describes"),
    "widths negative": (lambda: with_model(widths=[-4]), "widths"),
    "gamma a word": (lambda: with_model(gamma_init="a"), "gamma_init"),
    "classes as a word": (lambda: with_model(num_classes="10"), "num_classes"),
    "classes true": (lambda: with_model(num_classes=True), "num_classes"),
    # sizes that are not paid for
    "wide": (lambda: with_model(width=1e5), "another architecture"),
    "wide preresnet": (lambda: with_model("preresnet", width=1e5), "another architecture"),
    "growing": (lambda: with_model("densenet", growth=10**6), "another architecture"),
    "classes": (lambda: with_model("torchvision", name="resnet18", num_classes=2**50), "another architecture"),
    "classes of timm": (lambda: with_model("timm", name="test_resnet", num_classes=2**50), "another architecture"),
    "classes that would fit in memory": (lambda: with_model(num_classes=2**22), "another architecture"),
    "channels": (lambda: with_model("timm", name="test_resnet", in_channels=2**40), "another architecture"),
    "no outline and wide": (
        lambda: with_model("timm", name="vit_small_patch16_rope_mixed_224", num_classes=2**30),
        "very much larger",
    ),
    "image": (lambda: with_model("mlp", image_size=2**20), "another architecture"),
    "image beyond counting": (lambda: with_model("mlp", image_size=2**40), "no network is as it describes"),
    "deep preresnet": (lambda: with_model("preresnet", depth=9 * 10**9 + 2), "many more layers"),
    "deep densenet": (lambda: with_model("densenet", depth=3 * 10**9 + 4), "many more layers"),
    "many widths": (lambda: with_model(widths=[1] * 10**5), "many more layers"),
    "large before pruning": (big_before_pruning, "very much larger"),
    "weights that overlap": (shared_storage, "overlap"),
    # weights that are none
    "weight a number": (lambda: with_weight(3.0), "is a float"),
    "weight a list": (lambda: with_weight([1.0]), "is a list"),
    "weight none": (lambda: with_weight(None), "is a NoneType"),
    "weight sparse": (lambda: with_weight(torch.sparse_coo_tensor(size=(HUGE,))), "no dense tensor"),
    "weight meta": (lambda: with_weight(torch.empty(HUGE, device="meta")), "no dense tensor"),
    "weight expanded": (lambda: with_weight(torch.zeros(1).expand(HUGE)), "claims more numbers"),
    "weight empty and long": (lambda: with_weight(torch.zeros(0).new_empty((0, HUGE))), "claims more numbers"),
    "weight complex": (lambda: with_weight(torch.zeros(3, dtype=torch.complex64)), "is of torch.complex64"),
    "weight quantised": (
        lambda: with_weight(torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)),
        "no dense tensor",
    ),
    "weight of another shape": (lambda: with_weight(torch.zeros(3, 1)), "another architecture"),
    "weight beside the others": (lambda: with_weight(torch.zeros(1), "model.x"), "another architecture"),
    "no weights": (lambda: content() | {"state_dict": {}}, "many more layers|another architecture"),
    # plans
    "fingerprint a list": (in_plan(fingerprint=[1]), "fingerprint must be"),
    "layers a list": (in_plan(layers=[1]), "not a pruning plan"),
    "keep a list": (in_plan(keep=[1]), "keep must be"),
    "got empty": (in_plan(got={}), "not a pruning plan"),
    "unknown key": (in_plan(colour=1), "not a pruning plan"),
    "other network": (in_plan(fingerprint="0" * 32), "trace it anew"),
    "attributes a number": (in_plan(attributes=3), "attributes must be"),
    "spec a word": (in_plan(spec="shape"), "not a pruning plan|spec"),
    "spec huge": (in_plan(spec={"shape": [HUGE], "dtype": "float32"}), "cannot be"),
    "spec of a function": (in_plan(spec={"shape": [1], "dtype": "load"}), "cannot be"),
    "attribute that is a flag": (in_plan(attributes=[["", "training", None, 1]]), "is not a size"),
    "attribute that is a dict": (in_plan(attributes=[["", "_modules", 0, 1]]), "is not a size"),
    "attribute of a convolution": (in_plan(attributes=[["feature.0", "kernel_size", 0, 1]]), "is not a size"),
    "attribute of the class": (in_plan(attributes=[["", "_version", None, 0]]), "is not a size"),
    "attribute nowhere": (in_plan(attributes=[["feature.99", "x", None, 1]]), "is not a size"),
    "layer that is not there": (moved_layer("feature.0", "feature.77"), "no layer feature.77"),
    "layer that is a method": (moved_layer("feature.0", "feature.forward"), "no layer|of an unknown|no network"),
    "layer that is a ReLU": (moved_layer("feature.0", "feature.2"), "another architecture"),
    "layer that is no norm": (in_layer("feature.0", kind="norm"), "is no BatchNorm"),
    "layer a number": (in_plan(layers={"feature.0": 3}), "not a pruning plan"),
    "kind a list": (in_layer(kind=["norm"]), "unknown kind"),
    "size a word": (in_layer(size="ab"), "size of layer"),
    "size huge": (in_layer("feature.0", size=(HUGE, HUGE)), "size of layer"),
    "size nan": (in_layer(size=(float("nan"), 8)), "size of layer"),
    "size negative": (in_layer(size=(-8, 8)), "size of layer"),
    "indices words": (in_layer(ins=["0"]), "ins of layer"),
    "indices absurd": (in_layer(outs=[HUGE]), "outs of layer"),
    "indices negative": (in_layer(outs=[-1, 0]), "outs of layer"),
    "indices very many": (in_layer(outs=list(range(10**6))), "outs of layer"),
    "select too long": (in_layer(select=list(range(1000))), "select of layer"),
    "scatter a word": (in_layer(scatter="01"), "scatter of layer"),
    "width a word": (in_layer(width="8"), "width of layer"),
    "width huge": (
        lambda: pruned(
            lambda plan: plan["layers"]["feature.1"].update(
                scatter=list(range(len(plan["layers"]["feature.1"]["outs"]))), width=2**30
            )
        ),
        "width of layer",
    ),
}


def _without(key):
    made = content()
    del made["slimming"][key]
    return made


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No socket may connect, and nothing may be written."""

    def refuse(*args):
        raise AssertionError("a file made the loader open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "hostile.ckpt"


@pytest.mark.parametrize("name", RECORDS)
def test_a_hostile_record_is_one_error_of_ours(name, path):
    make, words = RECORDS[name]
    torch.save(make(), path)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(OURS, match=words) as caught:
        checkpoint.load(path)
    assert time.monotonic() - started < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES
    assert len(str(caught.value)) < 1500 and "\n" not in str(caught.value)
    assert os.listdir(path.parent) == [path.name]


def test_the_unchanged_ones_load(path):
    for make in (content, pruned):
        torch.save(made := make(), path)
        loaded = checkpoint.load(path).state_dict()
        assert all(torch.equal(loaded[k.removeprefix("model.")], v) for k, v in made["state_dict"].items())


@pytest.mark.parametrize("spec", [("timm", "test_resnet"), ("torchvision", "squeezenet1_1")])
@pytest.mark.parametrize("weights", ["DEFAULT", "trap.pt", ["DEFAULT"], 3, ""])
def test_weights_that_a_record_names_are_neither_fetched_nor_opened(spec, weights, path, tmp_path):
    """Files of early versions name them; their own weights are all that is needed."""
    os.mkfifo(tmp_path / "trap.pt")  # reading it would wait for ever
    kind, name = spec
    net = models.build(kind, name=name, num_classes=5)
    record = {"name": kind, "arguments": {"name": name, "weights": weights, "num_classes": 5}}
    torch.save(content(net, model=record), path)
    loaded = checkpoint.load(path).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "name"),
    [("torchvision", n) for n in ("swin_t", "densenet121", "maxvit_t", "googlenet")]
    + [("timm", n) for n in ("levit_128s", "test_coatnet", "vit_small_patch16_rope_mixed_224", "resnetblur18")],
)
def test_buffers_and_constants_that_are_in_no_file_are_as_the_constructor_makes_them(kind, name, path):
    torch.manual_seed(0)
    net = models.build(kind, name=name, num_classes=5).eval()
    torch.save(content(net, model={"name": kind, "arguments": {"name": name, "num_classes": 5}}), path)
    loaded = checkpoint.load(path)
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    for (key, a), (_, b) in zip(loaded.named_buffers(), net.named_buffers(), strict=True):
        assert torch.equal(a, b) or (a.isnan() & b.isnan()).all(), key
    size = 160 if name == "test_coatnet" else 224
    image = torch.randn(1, 3, size, size)
    with torch.no_grad():
        assert torch.equal(loaded(image), net(image))


def test_a_given_network_is_compared(path):
    torch.save(content(model=None), path)
    assert torch.equal(checkpoint.load(path, model=dense()).classifier.weight, dense().classifier.weight)
    with pytest.raises(CheckpointError, match="another architecture"):
        checkpoint.load(path, model=models.vgg(widths=[8, "M", 9], num_classes=3))
    torch.save(with_weight(torch.zeros(1).expand(HUGE)), path)
    with pytest.raises(CheckpointError, match="claims more numbers"):
        checkpoint.load(path, model=dense())


def test_the_random_numbers_of_a_network_are_those_of_its_constructor(path):
    """A training from fresh weights draws them once, so that its seed means what it did."""
    torch.save(content(), path)
    torch.manual_seed(3)
    expected = models.vgg(**ARGUMENTS).state_dict()
    torch.manual_seed(3)
    found = checkpoint.architecture(checkpoint.read(path)).state_dict()
    assert all(torch.equal(found[k], v) for k, v in expected.items())


def test_an_archive_that_unpacks_to_more_than_itself(path):
    torch.save(content(config={"a": "0" * 10**6}), path)
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(path.with_name("bomb"), "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in plain.namelist():
            bomb.writestr(entry, plain.read(entry))
    with pytest.raises(CheckpointError, match="unpacks to more"):
        checkpoint.load(path.with_name("bomb"))


# --- reference, plans, stages ---------------------------------------------------------------------------------------------


def reference_file(**changes):
    state = dense().state_dict() | changes
    return {"state_dict": {k: v for k, v in state.items() if v is not None}}


@pytest.mark.parametrize(
    "changes",
    [
        {"classifier.weight": None},
        {"classifier.weight": torch.zeros(3)},
        {"classifier.weight": torch.zeros(1, 1).expand(HUGE, 1)},
        {"classifier.bias": torch.zeros(())},
        {"classifier.bias": torch.empty(HUGE, device="meta")},
        {"feature.1.weight": torch.zeros(())},
        {"feature.1.weight": torch.zeros(0)},
        {"feature.1.weight": torch.zeros(9)},
        {"feature.1.num_batches_tracked": torch.zeros(2)},
        {"feature.0.weight": torch.zeros(8, 3)},
        {"feature.0.weight": torch.zeros(0).new_empty((0, 2**40, 3, 3))},
        {"feature.0.select.indexes": torch.zeros(2, 2)},
    ],
)
def test_a_hostile_port(changes, path):
    torch.save(reference_file(**changes), path)
    with pytest.raises(OURS):
        weights = reference.read(path)
        reference.io_shape(weights)
        reference.convert(weights, dense(), torch.zeros(1, 3, 8, 8), path)


@pytest.mark.parametrize("mask", [torch.ones(15), torch.ones(2, 8), torch.zeros(0), torch.full((16,), 3.0)])
def test_a_hostile_mask_of_a_port(mask, path):
    net = models.preresnet(depth=11, num_classes=3)
    torch.save({"state_dict": net.state_dict() | {"layer1.0.select.indexes": mask}}, path)
    weights = reference.read(path)
    if len(mask) == 16:  # any number but 0 keeps
        reference.convert(weights, net, torch.zeros(1, 3, 8, 8), path)
        return
    with pytest.raises(OURS):
        reference.convert(weights, net, torch.zeros(1, 3, 8, 8), path)


def test_a_port_with_a_numbered_weight(path):
    torch.save({"state_dict": dense().state_dict() | {3: torch.zeros(1)}}, path)
    with pytest.raises(CheckpointError, match="no string"):
        reference.read(path)


@pytest.mark.parametrize(
    "text", ["", "[", "[1]", "{}", '{"format": 2}', "[" * 10**5, "9" * 5000, '{"format": [2]}', "NaN"]
)
def test_a_hostile_plan_in_json(text):
    with pytest.raises(PlanError):
        slimming.PruningPlan.from_json(text)


def test_a_plan_as_json_goes_round():
    plan = slimming.PruningPlan.from_dict(pruned()["slimming"]["plans"][0])
    assert slimming.PruningPlan.from_json(plan.to_json()) == plan


def _stage(name):
    from slimming.stages import finetuning, pruning

    stages = {"prune": (pruning.prune, "PruneConfig"), "finetune": (finetuning.finetune, "FinetuneConfig")}
    return stages[name]


@pytest.mark.parametrize("stage", ["prune", "finetune"])
@pytest.mark.parametrize("key", ["config", "data"])
def test_a_stage_says_what_the_record_lacks(stage, key, path, tmp_path):
    torch.save(_without(key), path)
    function, _ = _stage(stage)
    config = compose_config(f"checkpoint={path}", *["ratio=0.5"] * (stage == "prune"), name=stage)
    with pytest.raises(CheckpointError, match=f"lacks '{key}'"):
        function(config, tmp_path / "run")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"trainer": {"max_epochs": "ten"}},
        {"trainer": {"max_epochs": 10**12}},
        {"trainer": {"_target_": ["os"]}},
        {"data": {"_target_": {"_target_": "os.system"}}},
        {"optimizer": {"_target_": 3}},
    ],
)
def test_finetune_refuses_hostile_recipes(config, path, tmp_path):
    recipe = {
        "data": {"_target_": "slimming.data.Digits"},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
        "scheduler": {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": 2},
        "trainer": {"_target_": "lightning.pytorch.Trainer", "max_epochs": 2},
    }
    merged = {k: recipe[k] | config.get(k, {}) for k in recipe} if config else {}
    torch.save(content(config=merged), path)
    with pytest.raises(OURS):
        _stage("finetune")[0](compose_config(f"checkpoint={path}", name="finetune"), tmp_path / "run")


@pytest.mark.parametrize(
    "change", [{"epoch": "3"}, {"loops": None}, {"optimizer_states": 3}, {"lr_schedulers": {}}, {"global_step": None}]
)
def test_a_run_that_cannot_be_resumed(change, tmp_path):
    whole = {"epoch": 1, "global_step": 9, "loops": {}, "optimizer_states": [], "lr_schedulers": []}
    torch.save(content(config={"seed": 1}) | whole, tmp_path / "last.ckpt")
    assert resume_point(True, {"seed": 1}, tmp_path).content["epoch"] == 1
    torch.save(content(config={"seed": 1}) | whole | change, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=f"its {next(iter(change))} is not there or malformed"):
        resume_point(True, {"seed": 1}, tmp_path)


def test_numbers_of_numpy_are_no_plain_data(path):
    torch.save(content(metrics={"a": np.float64(1)}), path)
    with pytest.raises(CheckpointError):
        checkpoint.load(path)
