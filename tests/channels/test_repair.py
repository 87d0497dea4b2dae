"""Repair: least squares against a brute-force reference, and what it may and may not change in a network."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models as zoo

import slimming
from slimming import models
from slimming.channels.repair import least_squares, refit, repair
from slimming.channels.repair.least_squares import Equations, applied, at, draw_positions
from slimming.channels.repair.lockstep import handed_over
from slimming.errors import GraphError, PlanError

LAYERS = {
    "conv": nn.Conv2d(6, 8, 3, padding=1),
    "strided": nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)),
    "same": nn.Conv2d(6, 8, (2, 3), padding="same", dilation=(1, 2)),
    "1x1": nn.Conv2d(6, 8, 1),
    "grouped": nn.Conv2d(6, 8, 3, padding=1, groups=2),
    "depthwise": nn.Conv2d(6, 12, 3, padding=1, groups=6),
    "linear": nn.Linear(6, 8),
}


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def columns(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Unfold a layer's input: (rows, C_in, kernel), rows in the order (item, position)."""
    if isinstance(layer, nn.Linear):
        return x[..., None]
    kernel = layer.kernel_size
    total = [d * (k - 1) for d, k in zip(layer.dilation, kernel, strict=True)]
    pads = [(p, p) for p in layer.padding] if layer.padding != "same" else [(t // 2, t - t // 2) for t in total]
    x = F.pad(x, (*pads[1], *pads[0]))
    unfolded = F.unfold(x, kernel, dilation=layer.dilation, stride=layer.stride)  # (N, C * kernel, positions)
    return unfolded.transpose(1, 2).reshape(-1, x.shape[1], kernel[0] * kernel[1])


def brute_force(layer, x, lack, ridge, intercept):
    """Solve every output by torch.linalg.lstsq, with a row for every ridge term; (C_out, inputs), (C_out,)."""
    groups = getattr(layer, "groups", 1)
    a, changes, shifts = columns(layer, x), [], []
    for group in range(groups):
        here = a.reshape(len(a), groups, -1)[:, group]  # (rows, inputs)
        r = lack.reshape(len(a), groups, -1)[:, group]
        centred = here - here.mean(0) if intercept else here
        penalty = ridge * centred.square().sum() / here.shape[1]
        ones = torch.ones(len(a), 1, dtype=a.dtype)
        top = torch.cat((here, ones), 1) if intercept else here
        bottom = torch.zeros(here.shape[1], top.shape[1], dtype=a.dtype)
        bottom[:, : here.shape[1]] = penalty.sqrt() * torch.eye(here.shape[1], dtype=a.dtype)
        target = torch.cat((r, torch.zeros(here.shape[1], r.shape[1], dtype=a.dtype)))
        found = torch.linalg.lstsq(torch.cat((top, bottom)), target, driver="gelsd").solution
        changes.append(found[: here.shape[1]].T)
        shifts.append(found[-1] if intercept else torch.zeros(r.shape[1], dtype=a.dtype))
    return torch.cat(changes), torch.cat(shifts)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_the_equations_give_what_brute_force_gives(name, intercept, monkeypatch):
    monkeypatch.setattr(least_squares, "BLOCK", 500)  # several blocks
    layer = LAYERS[name].double()
    x = draw(40, 6) + 0.5 if name == "linear" else draw(4, 6, 7, 6) + 0.5
    equations, seen = Equations(layer.weight, getattr(layer, "groups", 1)), []

    class Meet(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((func, args, kwargs or {}))
            return func(*args, **kwargs or {})

    with torch.inference_mode():
        with Meet():
            out = layer(x)
        positions = draw_positions(out, 10**9)
        lack = draw(len(positions[0]), out.shape[1], seed=2)
        equations.add(applied(*next(call for call in seen if call[1][1] is layer.weight)), positions, lack)
    rebuilt = torch.einsum(
        "rgi,goi->rgo",
        columns(layer, x).reshape(len(lack), equations.groups, -1),
        layer.weight.detach().reshape(equations.groups, -1, layer.weight[0].numel()),
    ).reshape(len(lack), -1)
    torch.testing.assert_close(rebuilt + layer.bias.detach(), at(out, positions).clone())  # the reference's own windows
    change, shift = equations.solve(0.05, intercept)
    expected, expected_shift = brute_force(layer, x, lack, 0.05, intercept)
    torch.testing.assert_close(change.reshape(expected.shape).clone(), expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(shift.clone(), expected_shift, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("spread", [0.1, 0.01, 1e-3, 0.0])
def test_inputs_that_hardly_vary_do_not_drown_in_rounding(spread):
    """As behind the pooling of a squeeze-excite layer: few rows in float32, near their mean."""
    layer, x = nn.Linear(12, 3), 3 + draw(1, 12).float() + spread * draw(24, 12, seed=1).float()
    wanted = spread * draw(24, 3, seed=2)
    equations = Equations(layer.weight.detach(), 1)
    equations.add(least_squares.Applied(x, layer.weight.detach(), None), (torch.arange(24),), wanted.float() + 1)
    change, shift = equations.solve(0.05, intercept=True)
    expected, expected_shift = brute_force(layer.double(), x.double(), wanted + 1, 0.05, True)
    if not spread:
        expected, expected_shift = torch.zeros(1, 3, 12), torch.ones(3)
    torch.testing.assert_close(change.reshape(expected.shape), expected, rtol=1e-2, atol=1e-3, check_dtype=False)
    torch.testing.assert_close(shift, expected_shift, rtol=1e-2, atol=1e-2, check_dtype=False)


def test_positions_are_distinct_and_the_same_each_time():
    out = torch.zeros(3, 2, 5, 4)
    drawn = torch.stack(draw_positions(out, 20))
    assert drawn.shape == (3, 20) and drawn.unique(dim=1).shape[1] == 20
    assert torch.equal(drawn, torch.stack(draw_positions(out, 20)))
    assert torch.stack(draw_positions(out, 60)).shape == (3, 60)


# --- networks -------------------------------------------------------------------------------------------------------

NETS = {
    "vgg11": lambda: models.vgg(11, width=0.125),
    "preresnet20": lambda: models.preresnet(20),
    "densenet22": lambda: models.densenet(22, growth=6),
    "resnet18": lambda: zoo.ResNet(zoo.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10, width_per_group=64),
    "mobilenet_v2": lambda: zoo.mobilenet_v2(num_classes=10, width_mult=0.25),
    "shufflenet": lambda: zoo.shufflenet_v2_x0_5(num_classes=10),
}


def settle(model: nn.Module, images: torch.Tensor, seed: int = 0) -> nn.Module:
    """Spread the gammas of a network and give its BatchNorms the statistics of the images."""
    torch.manual_seed(seed)
    model.double()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.02, 1)
        nn.init.uniform_(norm.bias, -0.2, 0.5)
    return slimming.calibrate(model, [images])


def pruned(model, images, ratio=0.4, **options):
    plan = slimming.trace(model, images[:1]).plan(slimming.GlobalRatio(ratio), **options)
    return slimming.prune(model, plan, verify=False), plan


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def differences(a: dict, b: dict) -> set[str]:
    return {k for k in a if not torch.equal(a[k], b[k])}


def error(model, dense, images) -> float:
    with torch.no_grad():
        return float((model.eval()(images) - dense.eval()(images)).square().mean())


@pytest.mark.parametrize("ties", ["together", "apart", "aligned"])
@pytest.mark.parametrize("name", NETS)
def test_a_repaired_network_is_nearer_to_the_dense_one(name, ties):
    images = draw(24, 3, 32, 32)
    torch.manual_seed(0)
    model = settle(NETS[name](), images)
    thin, plan = pruned(model, images, ties=ties)
    before = state(model), state(thin)
    repaired = refit(model, thin, plan, images.split(10))
    assert not differences(before[0], model.state_dict()) and not differences(before[1], thin.state_dict())
    assert not repaired.left and not repaired.model.training
    lost = [n for n, layer in plan.layers.items() if layer.kind in ("conv", "grouped", "linear")]
    assert {n for n in lost if len(plan.layers[n].ins) < plan.layers[n].size[0]} <= set(repaired.layers)
    assert error(repaired.model, model, images) < 0.5 * error(thin, model, images)
    kinds = {key.rpartition(".")[2] for key in differences(state(repaired.model), state(thin))}
    assert kinds <= {"weight", "bias", "running_mean"}


@pytest.mark.parametrize("name", NETS)
def test_where_only_dead_channels_go_nothing_changes(name):
    images = draw(8, 3, 32, 32)
    torch.manual_seed(0)
    model = settle(NETS[name](), images)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        with torch.no_grad():
            norm.weight[::3] = norm.bias[::3] = 0
    plan = slimming.trace(model, images[:1]).plan(slimming.Threshold(0), ties="apart")
    thin = slimming.prune(model, plan)
    assert plan.got["removed"] > 10
    repaired = refit(model, thin, plan, [images])
    assert not repaired.layers and not differences(state(repaired.model), state(thin))


class Net(nn.Module):
    """Two convolutions with a BatchNorm and a ReLU between, then `end`."""

    def __init__(self, *end, bias=False, second=None):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2 = second or nn.Conv2d(8, 6, 3, bias=bias)
        self.end = nn.Sequential(*end)

    def forward(self, x):
        return self.end(self.conv2(F.relu(self.norm1(self.conv1(x)))))


def changed(model, images=None, **options):
    """Repair a pruned network; return the keys of the state that change."""
    images = draw(30, 3, 9, 9) if images is None else images
    model = settle(model, images)
    thin, plan = pruned(model, images, **options)
    return differences(state(thin), state(repair(model, thin, plan, [images])))


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x):
        return self.norm(x) + x


class Twice(Both):
    def forward(self, x):
        return self.norm(self.norm(x))


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        (Net(bias=True), {"conv2.weight", "conv2.bias"}),
        (Net(nn.BatchNorm2d(6), bias=True), {"conv2.weight", "conv2.bias"}),
        (Net(nn.BatchNorm2d(6)), {"conv2.weight", "end.0.running_mean"}),
        (Net(), {"conv2.weight"}),
        (Net(nn.ReLU(), nn.BatchNorm2d(6)), {"conv2.weight"}),
        (Net(nn.BatchNorm2d(6, track_running_stats=False)), {"conv2.weight"}),
        (Net(Both()), {"conv2.weight"}),
        (Net(Twice()), {"conv2.weight"}),
    ],
    ids=["bias", "bias-norm", "norm", "none", "relu-norm", "no statistics", "norm and sum", "norm twice"],
)
def test_where_the_intercept_goes(model, keys):
    names = {"ignore": ["end*"]} if len(model.end) and not isinstance(model.end[-1], nn.ReLU) else {}
    assert changed(model, **names) == keys


def test_the_intercept_restores_the_mean_of_every_output():
    images = draw(30, 3, 9, 9)
    model = settle(Net(bias=True), images)
    thin, plan = pruned(model, images)
    repaired = repair(model, thin, plan, [images], ridge=0.1)
    with torch.no_grad():
        torch.testing.assert_close(repaired(images).mean((0, 2, 3)), model(images).mean((0, 2, 3)))


class Shared(nn.Module):
    """A layer that runs twice, with another in between."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.often, self.norms = nn.Conv2d(8, 8, 1), nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])
        self.between, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.norms[0](self.often(x)))
        return self.head(F.relu(self.norms[1](self.often(self.between(x)))))


def test_a_layer_that_runs_twice_is_fitted_to_both_runs():
    images = draw(40, 3, 6, 6)
    model = settle(Shared(), images)
    thin, plan = pruned(model, images)
    repaired = refit(model, thin, plan, [images])
    assert repaired.layers == ["often", "between", "head"]
    assert error(repaired.model, model, images) < 0.5 * error(thin, model, images)


class Tied(Net):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__(nn.BatchNorm2d(6))
        self.again = nn.Conv2d(8, 6, 3, bias=False)
        self.again.weight = self.conv2.weight

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        return self.end(self.conv2(x)) + self.again(x)


def test_what_cannot_be_refitted_is_named(monkeypatch):
    images = draw(20, 3, 9, 9)
    model = settle(Net(nn.BatchNorm2d(6), second=nn.ConvTranspose2d(8, 6, 3)), images)
    repaired = refit(model, *pruned(model, images, ignore=["end*"]), [images])
    assert (repaired.layers, repaired.left) == ([], {"conv2": "a transposed convolution"})
    monkeypatch.setitem(refit.__globals__, "LARGEST", 20)
    model = settle(Net(bias=True), images)
    repaired = refit(model, *pruned(model, images), [images])
    assert (repaired.layers, list(repaired.left)) == ([], ["conv2"]) and "more than 20" in repaired.left["conv2"]


def test_a_weight_of_two_layers_stays():
    assert not {key for key in changed(Tied(), ties="apart") if "weight" in key}


def test_a_linear_layer_behind_flatten_and_positions_that_are_left_out(monkeypatch):
    monkeypatch.setitem(refit.__globals__, "ROWS", 1000)
    end = nn.Flatten(), nn.Linear(6 * 5 * 5, 5)
    images = draw(400, 3, 9, 9)
    model = settle(Net(nn.BatchNorm2d(6), nn.ReLU(), *end), images)
    thin, plan = pruned(model, images, ratio=0.5)
    assert len(plan.layers["end.3"].ins) < 150
    repaired = refit(model, thin, plan, [images])
    assert repaired.layers == ["conv2", "end.3"]
    assert error(repaired.model, model, images) < 0.7 * error(thin, model, images)


def test_errors(monkeypatch):
    threads = threading.active_count()
    images = draw(20, 3, 9, 9)
    model = settle(Net(nn.BatchNorm2d(6)), images)
    thin, plan = pruned(model, images)
    with pytest.raises(GraphError, match="at least one batch"):
        repair(model, thin, plan, [])
    with pytest.raises(PlanError, match="norm1 of the thin network is not what prune"):
        repair(model, model, plan, [images])
    with pytest.raises(PlanError, match="trace it anew"):
        repair(thin, thin, plan, [images])
    with pytest.raises(GraphError, match=r"repair of conv2: its Gram matrix is singular .* at ridge=0: raise"):
        repair(model, thin, plan, [images[:1]], ridge=0)
    monkeypatch.setitem(refit.__globals__, "MEMORY", 200_000)
    with pytest.raises(GraphError, match=r"repair of 20 images takes .* at most \d+ images \(repair.images\)"):
        repair(model, thin, plan, [images])
    assert threading.active_count() == threads


def test_batches_may_hold_labels_and_single_precision_works():
    images = draw(24, 3, 9, 9)
    model = settle(Net(nn.BatchNorm2d(6)), images)
    thin, plan = pruned(model, images)
    expected = state(repair(model, thin, plan, images.split(8)))
    for batches in ([(images, torch.zeros(24))], iter([images])):
        assert not differences(expected, state(repair(model, thin, plan, batches)))
    single = repair(model.float(), thin.float(), plan, [images.float()])
    for key, value in single.state_dict().items():
        torch.testing.assert_close(value.double(), expected[key].double(), rtol=1e-3, atol=1e-4)


# --- lockstep -------------------------------------------------------------------------------------------------------


def test_a_run_waits_for_its_reader():
    log = []

    def run(hand_over):
        for number in range(3):
            log.append(number)
            hand_over(number)
        log.append("end")

    items = handed_over(run)
    assert not log and next(items) == 0 and log == [0]
    assert list(items) == [1, 2] and log == [0, 1, 2, "end"]


def test_the_error_of_a_run_is_raised_and_a_run_that_nobody_reads_ends():
    def failing(hand_over):
        hand_over(1)
        raise ValueError("in the thread")

    with pytest.raises(ValueError, match="in the thread"):
        list(handed_over(failing))
    threads, items = threading.active_count(), handed_over(lambda hand_over: [hand_over(n) for n in range(9)])
    assert next(items) == 0 and threading.active_count() == threads + 1
    items.close()
    assert threading.active_count() == threads
