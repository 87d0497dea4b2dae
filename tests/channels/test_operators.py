"""Networks that exercise one thing each; whatever is not understood is frozen, listed and still exact."""

import dataclasses
import functools

import pytest
import torch
from exactness import assert_exact, randomise
from torch import nn
from torch.nn import functional as F

import slimming
from slimming.errors import GraphError


def net(layers: dict[str, nn.Module], forward) -> nn.Module:
    """Make a module of layers and a function (self, x) -> output."""
    kind = type("Net", (nn.Module,), {"forward": forward})
    module = kind()
    torch.manual_seed(0)
    for name, layer in layers.items():
        setattr(module, name, layer() if isinstance(layer, type) else layer)
    return module


def conv_bn(c_in, c_out, **kwargs):
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False, **kwargs), nn.BatchNorm2d(c_out))


def check(model, example, ties=("together", "apart"), ratio=0.5, shrinks=True):
    """Trace, prune each way (aligned where anything may go), compare; returns the graph."""
    randomise(model)
    graph = slimming.trace(model, example)
    for how in (*ties, *["aligned"] * bool(graph.candidates("aligned").any())):
        plan = graph.plan(slimming.GlobalRatio(ratio), ties=how)
        thin = assert_exact(model, plan, example)
        if shrinks:
            assert sum(p.numel() for p in thin.parameters()) < sum(p.numel() for p in model.parameters())
            assert plan.got["removed"] > 0
    return graph


IMAGE = torch.randn(1, 3, 8, 8, dtype=torch.float64)


def option_a():
    """A residual block whose shortcut pads channels with zeros: the amounts are written into forward."""

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.b(F.relu(self.a(x)))
        return self.fc(F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))).mean((2, 3)))

    return net(
        {"stem": conv_bn(3, 4), "a": conv_bn(4, 8, stride=2), "b": conv_bn(8, 8), "fc": nn.Linear(8, 2)}, forward
    )


def conv1d():
    layers = nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 6, 3), nn.BatchNorm1d(6), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(6 * 8, 2))


def conv3d():
    layers = nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 2)
    return nn.Sequential(*layers)


def transposed():
    layers = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2), nn.BatchNorm2d(6)
    return nn.Sequential(*layers, nn.Conv2d(6, 2, 1))


def pixel_shuffle():
    layers = (
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.PixelShuffle(2),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.BatchNorm2d(6),
    )
    return nn.Sequential(*layers, nn.PixelUnshuffle(2), nn.Conv2d(24, 2, 1))


def used_twice():
    def forward(self, x):
        x = self.stem(x)
        return self.head(self.body(F.relu(self.body(F.relu(x)))))

    return net({"stem": conv_bn(3, 8), "body": conv_bn(8, 8), "head": nn.Conv2d(8, 2, 1)}, forward)


def control_flow():
    def forward(self, x):
        for layer in self.layers:
            x = layer(x) if layer is self.layers[0] else x + layer(F.relu(x))
        return self.head(x) if x.mean() > -1e9 else x

    return net(
        {"layers": nn.ModuleList([conv_bn(3, 8), conv_bn(8, 8), conv_bn(8, 8)]), "head": nn.Conv2d(8, 2, 1)}, forward
    )


def dict_output():
    def forward(self, x):
        x = F.relu(self.a(x))
        return {"out": self.b(x), "more": (self.c(x), [self.c(x).sum((2, 3))])}

    return net({"a": conv_bn(3, 8), "b": conv_bn(8, 4), "c": nn.Conv2d(8, 2, 1)}, forward)


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    features: torch.Tensor


def object_output():
    def forward(self, x):
        features = self.a(x)
        return Output(self.head(F.relu(self.b(F.relu(features)))), features)

    return net({"a": conv_bn(3, 8), "b": conv_bn(8, 8), "head": nn.Conv2d(8, 2, 1)}, forward)


def functional_layers():
    """Layers made inside forward, and weights that the network itself owns."""

    def forward(self, x):
        x = nn.ReLU()(self.norm(F.conv2d(x, self.kernel, padding=1)))
        return F.linear(nn.AdaptiveAvgPool2d(1)(x).flatten(1), self.matrix)

    kernel, matrix = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.randn(2, 8))
    return net({"kernel": kernel, "norm": nn.BatchNorm2d(8), "matrix": matrix}, forward)


def dense_flatten():
    layers = (
        conv_bn(3, 8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 16, 12),
        nn.BatchNorm1d(12),
        nn.ReLU(),
    )
    return nn.Sequential(*layers, nn.Linear(12, 2))


def upsampled_unet():
    def forward(self, x):
        a = F.relu(self.a(x))
        b = F.relu(self.b(F.max_pool2d(a, 2)))
        return self.head(torch.cat((F.interpolate(b, scale_factor=2, mode="bilinear"), a), 1))

    return net({"a": conv_bn(3, 8), "b": conv_bn(8, 8), "head": nn.Conv2d(16, 2, 1)}, forward)


def dynamic_view():
    def forward(self, x):
        x = F.relu(self.a(x))
        return self.fc(x.view(x.size(0), x.size(1), -1).mean(-1))

    return net({"a": conv_bn(3, 8), "fc": nn.Linear(8, 2)}, forward)


def stacked():
    def forward(self, x):
        return self.head(torch.stack((self.a(x), self.b(x)), 0).sum(0).relu())

    return net({"a": conv_bn(3, 8), "b": conv_bn(3, 8), "head": nn.Conv2d(8, 2, 1)}, forward)


def averaged():
    def forward(self, x):
        x = F.relu(self.a(x))
        return self.head(x / (1 + x.abs().mean(1, keepdim=True)))

    return net({"a": conv_bn(3, 8), "head": nn.Conv2d(8, 2, 1)}, forward)


def batch_norm_without_scales():
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(8, 2, 1))


def anchors():
    """A detector's head: a grid and strides that come from shapes and types of activations alone."""

    def forward(self, x):
        x = F.relu(self.a(x))
        y = self.head(x)
        _, _, h, w = y.shape
        rows = torch.arange(h).type_as(x) + y.new_full((h,), 0.5)
        columns = torch.linspace(0, 1, w).type_as(x) * x.new_ones(1)
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).flatten(1)  # (2, h * w)
        centres, sizes = y.flatten(2).chunk(2, 1)
        return torch.cat((centres + grid, sizes.exp() * y.new_full((1, 2, h * w), 8)), 1)

    return net({"a": conv_bn(3, 8), "head": nn.Conv2d(8, 4, 1)}, forward)


UNDERSTOOD = [conv1d, conv3d, transposed, pixel_shuffle, used_twice, dict_output, object_output, functional_layers]
UNDERSTOOD += [dense_flatten, upsampled_unet, dynamic_view, batch_norm_without_scales, stacked, anchors]


@pytest.mark.parametrize("make", UNDERSTOOD, ids=lambda f: f.__name__)
def test_understood_whole(make):
    example = {"conv1d": torch.randn(1, 3, 12), "conv3d": torch.randn(1, 3, 5, 5, 5)}.get(make.__name__, IMAGE).double()
    assert check(make(), example).unknown == []


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (option_a, "it pads channels by amounts written into forward"),
        (control_flow, "it runs over channels"),
        (averaged, "it runs over channels"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_frozen_in_part(make, reason):
    graph = check(make(), IMAGE, ties=("apart",))
    assert any(reason in line for line in graph.unknown)
    assert all(line in graph.describe() for line in graph.unknown)


def test_option_a_prunes_inside_the_block():
    graph = check(option_a(), IMAGE)
    assert int(graph.candidates("together")[graph.norms["a.1"].all].sum()) == 8
    assert int(graph.candidates("together")[graph.norms["b.1"].all].sum()) == 0


class Fixed(nn.Module):
    """Sizes written into forward in every way."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        self.a, self.b, self.fc = conv_bn(3, 8), conv_bn(8, 8), nn.Linear(8, 2)
        self.scale = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.norm, self.group = nn.LayerNorm(8), nn.GroupNorm(2, 8)

    def forward(self, x):
        x = F.relu(self.b(F.relu(self.a(x))))
        match self.how:
            case "view":
                x = x.view(-1, 8, 64).mean(-1)[:, :, None, None]
            case "flat view":
                x = x.mean((2, 3)).view(-1, 8)[:, :, None, None]
            case "slice":
                x = torch.cat((x[:, :3], x[:, 3:]), 1)
            case "split":
                x = torch.cat(torch.split(x, 4, 1)[::-1], 1)
            case "constant":
                x = x * (self.scale + 1)
            case "constant sum":
                x = x + torch.ones(8, 1, 1, dtype=x.dtype)
            case "zeros":
                x = torch.cat((x, torch.zeros_like(x)), 1)[:, :8]
            case "index":
                x = x[:, [7, 6, 5, 4, 3, 2, 1, 0]]
            case "layer norm":
                x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            case "group norm":
                x = self.group(x)
            case "attention":
                q = x.flatten(2)
                x = (q @ q.transpose(1, 2)).softmax(-1) @ q
                x = x.view(-1, 8, 8, 8)
            case "cumulative":
                x = x.cumsum(1)
        return self.fc(x.mean((2, 3)))


HOW = ["view", "flat view", "slice", "split", "constant", "constant sum", "zeros", "index", "layer norm", "group norm"]
HOW += ["attention", "cumulative"]


@pytest.mark.parametrize("how", HOW)
def test_what_cannot_be_proven_is_left_alone(how):
    model = Fixed(how)
    graph = check(model, IMAGE)
    assert graph.unknown, how
    together = graph.candidates("together")
    assert together[graph.norms["a.1"].all].all() and not together[graph.norms["b.1"].all].any()
    with pytest.raises(GraphError, match="strict: not everything is understood"):
        slimming.trace(model, IMAGE, strict=True)


@pytest.mark.parametrize(
    "grow",
    [
        lambda self, x: x * x.new_full((1, 8, 1, 1), 2.0),
        lambda self, x: x * x.new_full((1, x.shape[1], 1, 1), 2.0),
        lambda self, x: x + x.new_ones((x.size(1), 1, 1)),
        lambda self, x: x * torch.arange(8.0).view(8, 1, 1).type_as(x),
        lambda self, x: self.mix(x.new_ones((1, x.shape[1]))).mean() + x,
        lambda self, x: x + torch.meshgrid(x[0, :, 0, 0], x[0, 0, 0, :2], indexing="ij")[0][None, :, :1, None],
    ],
    ids=["written", "read", "added", "converted", "counted", "spread"],
)
def test_constants_as_wide_as_the_channels_keep_them(grow):
    def forward(self, x):
        return self.fc(grow(self, F.relu(self.b(F.relu(self.a(x))))).mean((2, 3)))

    layers = {"a": conv_bn(3, 8), "b": conv_bn(8, 8), "mix": nn.Linear(8, 2), "fc": nn.Linear(8, 2)}
    graph = check(net(layers, forward), IMAGE)
    together = graph.candidates("together")
    assert together[graph.norms["a.1"].all].all() and not together[graph.norms["b.1"].all].any()


def test_a_reason_names_the_layer_that_ran_and_no_other():
    assert slimming.trace(randomise(Fixed("cumulative")), IMAGE).unknown == ["cumsum: no rule for it"]
    summing = net({"a": conv_bn(8, 8)}, lambda self, x: self.a(x).cumsum(1))
    inner = nn.Sequential(conv_bn(3, 8), summing, nn.Conv2d(8, 2, 1))
    assert slimming.trace(randomise(inner), IMAGE).unknown == ["cumsum in 1: no rule for it"]


def test_a_computed_weight_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6))
    model.append(nn.Conv2d(6, 2, 1))
    nn.utils.parametrizations.weight_norm(model[3])
    graph = check(model, IMAGE, ties=("apart",), shrinks=False)
    assert "computed or shared" in graph.unknown[0]


def test_several_inputs():
    def forward(self, x, *, y):
        return self.head(F.relu(self.a(x) + self.b(y)))

    model = net({"a": conv_bn(3, 8), "b": conv_bn(3, 8), "head": nn.Conv2d(8, 2, 1)}, forward)
    check(model, {"x": IMAGE, "y": IMAGE.clone()})


def test_layers_that_run_in_training_alone_are_resized_too():
    def forward(self, x):
        x = F.relu(self.a(x))
        return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)

    model = net({"a": conv_bn(3, 8), "head": nn.Conv2d(8, 2, 1), "auxiliary": nn.Conv2d(8, 2, 3)}, forward)
    graph = check(model, IMAGE)
    assert graph.plan(slimming.GlobalRatio(0.5)).layers["auxiliary"].size == (8, 2)


def _asks(module):
    return module.training


def _wrapped(forward):
    @functools.wraps(forward)
    def call(self, x):
        return forward(self, x)

    return call


def _with_auxiliary(training):
    def forward(self, x):
        x = F.relu(self.a(x))
        return (self.head(x), self.auxiliary(x)) if training(self) else self.head(x)

    return forward


@pytest.mark.parametrize(
    "forward",
    [
        torch.autocast("cpu", enabled=False)(_with_auxiliary(lambda self: self.training)),
        _wrapped(_with_auxiliary(lambda self: getattr(self, "train" + "ing"))),
        _with_auxiliary(_asks),
        _with_auxiliary(lambda self: self.state["module"][0].training),
        _with_auxiliary(lambda self: F.dropout(torch.ones(1), 1.0, self.training).item() == 0),
    ],
    ids=["autocast", "wraps", "helper", "elsewhere", "by its effect"],
)
def test_layers_of_training_are_found_however_the_code_asks(forward):
    layers = {"a": conv_bn(3, 8), "head": nn.Conv2d(8, 2, 1), "auxiliary": nn.Conv2d(8, 2, 3)}
    model = net(layers, forward)
    model.state = {"module": [model.a]}
    plan = check(model, IMAGE).plan(slimming.GlobalRatio(0.5))
    assert plan.layers["auxiliary"].size == (8, 2) and plan.train_watched


def test_a_network_that_fails_in_training_is_said_to():
    def forward(self, x):
        if self.training:
            raise ValueError("targets should not be None")
        return self.head(F.relu(self.a(x)))

    model = randomise(net({"a": conv_bn(3, 8), "head": nn.Conv2d(8, 2, 1)}, forward))
    graph = slimming.trace(model, IMAGE)
    plan = graph.plan(slimming.GlobalRatio(0.5))
    assert not plan.train_watched and "targets should not be None" in plan.train_reason
    assert "not watched in train mode" in plan.describe() and "not watched" in graph.describe()
    with pytest.raises(GraphError, match="train mode fails"):
        slimming.trace(model, IMAGE, strict=True)


def test_two_parameters_that_are_one():
    model = net({"a": conv_bn(3, 8), "b": conv_bn(8, 8), "c": conv_bn(8, 8), "head": nn.Conv2d(8, 2, 1)}, None)
    type(model).forward = lambda self, x: self.head(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))))
    model.c[0].weight = model.b[0].weight
    graph = check(model, IMAGE, ties=("apart",), shrinks=False)
    assert any("shared between modules" in reason for reason in graph.unknown)


def test_half_precision_and_example_of_any_batch():
    model = nn.Sequential(*conv_bn(3, 8), nn.ReLU(), nn.Conv2d(8, 2, 1)).to(torch.bfloat16)
    example = torch.randn(5, 3, 8, 8, dtype=torch.bfloat16)
    thin = slimming.prune(model, slimming.trace(model, example).plan(slimming.GlobalRatio(0.5)))
    assert thin(example).dtype == torch.bfloat16


def test_channels_last_stays():
    model = nn.Sequential(*conv_bn(3, 8), nn.ReLU(), *conv_bn(8, 8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    model = randomise(model).to(memory_format=torch.channels_last)
    thin = slimming.prune(model, slimming.trace(model, IMAGE).plan(slimming.GlobalRatio(0.5)))
    assert thin[3].weight.is_contiguous(memory_format=torch.channels_last)
