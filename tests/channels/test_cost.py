"""MACs against closed forms and against torch's own counter, on every torchvision classification network."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models as zoo
from torchvision import ops
from torchvision.models.maxvit import MaxVit

import slimming
from slimming.channels.cost import cost


def torchs_macs(model: nn.Module, example: torch.Tensor) -> float:
    """Half of what torch counts, without the attention that it does not count: the fast path, and one kernel on CPUs."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.eval()(example)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    return counter.get_total_flops() / 2


def test_convolutions_and_linear_layers():
    net = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),  # 8x8 -> 4x4
        nn.ConvTranspose2d(6, 3, 2, stride=2),  # 4x4 -> 8x8
        nn.Flatten(),
        nn.Linear(3 * 64, 5),
    )
    counted = cost(net, torch.zeros(3, 4, 8, 8))
    assert counted.layers == {"0": 16 * 6 * 2 * 9, "1": 16 * 6 * 3 * 4, "3": 192 * 5}
    assert counted.macs == sum(counted.layers.values()) and counted.flops == 2 * counted.macs
    assert counted.activation_bytes == 4 * (6 * 16 + 3 * 64 + 5)  # the flattening is a view
    assert counted.layer_params == {"0": 6 * 2 * 9 + 6, "1": 6 * 3 * 4 + 3, "3": 192 * 5 + 5}
    assert counted.num_params == (6 * 2 * 9 + 6) + (6 * 3 * 4 + 3) + (192 * 5 + 5)


def test_functional_calls_shared_layers_and_products_of_activations():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))
            self.fc = nn.Linear(4, 4)

        def forward(self, x):  # (N, T, 4)
            x = self.fc(self.fc(F.linear(x, self.weight)))
            return x @ x.transpose(1, 2) @ x

    counted = cost(Net(), torch.zeros(2, 5, 4))
    assert counted.layers == {"": 5 * 16 + 2 * (5 * 5 * 4), "fc": 2 * (5 * 16)}


def test_the_model_is_left_as_it_is():
    net = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3)).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    cost(net, torch.randn(4, 2, 7))
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


class Products(nn.Module):
    """One function of the input and a parameter, under the name `inner`."""

    def __init__(self, function, *shape):
        super().__init__()
        self.inner = nn.Module()
        self.inner.weight = nn.Parameter(torch.ones(shape))
        self.function = function

    def forward(self, x):
        return self.function(x, self.inner.weight)


@pytest.mark.parametrize(
    ("function", "shape", "macs"),  # x is (3, 4, 5)
    [
        (lambda x, w: torch.einsum("b t c, d c -> b d t", x, w), (6, 5), 4 * 6 * 5),
        (lambda x, w: torch.einsum("...tc,...sc->...ts", x, x), (1,), 4 * 4 * 5),
        (lambda x, w: torch.einsum("btc,bsc,bsd->btd", x, x, x), (1,), 2 * 4 * 4 * 5),
        (lambda x, w: torch.einsum("btc->bc", x), (1,), 0),
        (lambda x, w: torch.tensordot(x, w, 2), (4, 5, 2), 20 * 2),
        (lambda x, w: torch.inner(x, w), (6, 5), 4 * 6 * 5),
        (lambda x, w: x @ w, (5,), 4 * 5),
        (lambda x, w: F.linear(x, w), (5,), 4 * 5),
        (lambda x, w: torch.stack([torch.mv(y, w) for y in x]), (5,), 4 * 5),
        (lambda x, w: torch.stack([torch.addmv(w[:4], y, w) for y in x]), (5,), 4 * 5),
        (lambda x, w: torch.stack([torch.dot(y[0], w) for y in x]), (5,), 5),
        (lambda x, w: torch.linalg.multi_dot([x[0], w, x[0]])[None].expand(3, -1, -1), (5, 4), 2 * 5 * 16 // 3),
        (lambda x, w: torch.baddbmm(x, x @ w, x), (5, 4), 5 * 16 + 4 * 20),
        (lambda x, w: x * w + x / w, (4, 5), 0),
        (lambda x, w: F.layer_norm(x, (4, 5), w), (4, 5), 0),
    ],
)
def test_products_of_every_kind(function, shape, macs):
    counted = cost(Products(function, *shape), torch.ones(3, 4, 5))
    assert (counted.macs, counted.uncounted) == (macs, [])


def test_products_are_booked_on_the_layer_whose_weight_they_use():
    counted = cost(Products(lambda x, w: torch.einsum("btc,dc->btd", x, w), 6, 5), torch.ones(3, 4, 5))
    assert counted.layers == {"inner": 4 * 5 * 6}


@pytest.mark.parametrize(
    ("function", "shape", "name"),
    [
        (lambda x, w: F.bilinear(x, x, w), (2, 5, 5), "bilinear in inner"),
        (lambda x, w: torch.cdist(x, w), (3, 6, 5), "cdist in inner"),
        (lambda x, w: torch.fft.rfft(x).real, (1,), "fft_rfft"),
        (
            lambda x, w: ops.deform_conv2d(x[:, None], torch.ones(3, 18, 2, 3), w),
            (2, 1, 3, 3),
            "torchvision::deform_conv2d in inner",
        ),
    ],
)
def test_what_multiplies_and_is_not_counted_is_named(function, shape, name):
    model = Products(lambda x, w: (function(x, w), function(x, w))[0], *shape)
    assert cost(model, torch.ones(3, 4, 5)).uncounted == [name]


@pytest.mark.parametrize("fast", [True, False])
def test_attention_counts_with_the_fast_path_and_without(fast):
    """torch's fast path runs a whole encoder layer as one operator that torch's own counter takes for nothing."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    attention = zoo.VisionTransformer(16, 4, 2, 2, 8, 12, num_classes=3)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        counted = [cost(layer, torch.randn(2, 5, 8)), cost(attention, torch.randn(2, 3, 16, 16))]
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    expected = [torchs_macs(layer, torch.randn(2, 5, 8)), torchs_macs(attention, torch.randn(2, 3, 16, 16))]
    assert [2 * c.macs for c in counted] == expected and not any(c.uncounted for c in counted)


def test_the_meta_device_counts_the_same():
    """No memory, no arithmetic: sizes alone say what a network costs."""
    model, example = zoo.mobilenet_v3_small(num_classes=4), torch.zeros(2, 3, 32, 32)
    assert cost(model.to("meta"), example.to("meta")) == cost(zoo.mobilenet_v3_small(num_classes=4), example)


def maxvit() -> MaxVit:
    torch.manual_seed(0)
    return MaxVit((32, 32), 8, 2, [8, 16], [1, 1], 4, 0.0, num_classes=3)


def test_a_budget_counts_what_pruning_cannot_change():
    model, example = maxvit().eval(), torch.randn(1, 3, 32, 32)
    graph = slimming.trace(model, example)
    dense = torchs_macs(model, example)
    assert graph.dense_cost["macs"] == cost(model, example).macs == dense
    plan = graph.plan(slimming.Budget(macs=0.9))
    share = torchs_macs(slimming.prune(model, plan), example) / dense
    assert share <= 0.9 and plan.got["macs"] == pytest.approx(share, rel=1e-12)


def test_what_the_input_does_not_reach_counts_in_a_budget_too():
    class Net(nn.Sequential):
        def forward(self, x):
            return super().forward(x) * F.linear(torch.ones(7, 5), self[0].weight.new_ones(3, 5)).sum()

    model, example = Net(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)), torch.zeros(1, 3, 2, 2)
    assert slimming.trace(model, example).dense_cost["macs"] == cost(model, example).macs == 4 * 12 + 7 * 5 * 3


@pytest.mark.parametrize("batch", [1, 2])
def test_windows_in_the_place_of_the_batch_count_in_a_budget(batch):
    """Rows of the image take the batch's axis: layers, products and attention run once for each."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
            self.fc, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            x = F.relu(self.norm(self.conv(x)))
            rows = x.permute(0, 2, 3, 1).flatten(0, 1)  # (N * H, W, C)
            rows = (rows @ rows.transpose(1, 2)).softmax(-1) @ rows
            rows = F.scaled_dot_product_attention(rows, rows, rows, scale=1.0)
            rows = self.fc(rows).unflatten(0, (len(x), -1))
            return self.head(rows.mean((1, 2)))

    model, example = Net().eval(), torch.randn(batch, 3, 5, 7)
    graph = slimming.trace(model, example)
    assert graph.dense_cost["macs"] == batch * cost(model, example).macs
    plan = graph.plan(slimming.GlobalRatio(0.5), ties="apart")
    share = cost(slimming.prune(model, plan), example).macs / cost(model, example).macs
    assert share < 0.7 and plan.got["macs"] == pytest.approx(share, rel=1e-12)


QUICK = {"maxvit_t", "mobilenet_v3_small", "resnet18", "squeezenet1_1", "swin_v2_t", "vit_b_16"}


@pytest.fixture
def blank(monkeypatch):
    """Networks are made without drawing: untouched memory costs nothing, and the meta device needs none."""
    for name in dir(nn.init):
        if name.endswith("_") and not name.startswith("_"):
            monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in zoo.list_models(module=zoo)]
)
def test_macs_equal_those_of_torch_on_torchvisions_networks(name, blank):
    told = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = zoo.get_model(name, weights=None, **told).to("meta")
    size = 299 if name == "inception_v3" else 224
    example = torch.zeros(1, 3, size, size, device="meta")
    counted = cost(model, example)
    assert (counted.macs, counted.uncounted) == (torchs_macs(model, example), [])
    if name == "vit_b_16":
        assert counted.macs == 17_563_828_224
