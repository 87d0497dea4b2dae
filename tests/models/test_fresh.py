"""Fresh weights of a pruned network are those of one that was built at its widths."""

import math

import pytest
import torch
from torch import nn

import slimming
from slimming import models
from slimming.channels.cost import widths
from slimming.errors import ConfigError
from slimming.models.fresh import redraw_as_built


def thin(model: nn.Module, size: int = 32, channels: int = 3, **options) -> nn.Module:
    """Remove half of the channels, drawn by lot."""
    graph = slimming.trace(model.eval(), torch.randn(1, channels, size, size))
    plan = graph.plan(slimming.GlobalRatio(0.5), score="random", seed=3, **options)
    return slimming.prune(model, plan, verify=False)  # equal channels: a LayerNorm of them is all rounding


def drawn(model: nn.Module, spec: dict | None, seed: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return models.redraw(model, spec)


def same(a: nn.Module, b: nn.Module) -> bool:
    a, b = (m.state_dict() for m in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("vgg", {"depth": 11, "width": 0.25, "num_classes": 7, "gamma_init": 0.25}, 32),
        ("mlp", {"widths": [30, 20], "image_size": 8, "in_channels": 3}, 8),
    ],
)
def test_the_draws_are_those_of_the_same_network_at_these_widths(name, arguments, size):
    small = thin(models.build(name, **arguments), size)
    at_widths = {k: v for k, v in arguments.items() if k != "width"} | {"widths": widths(small)}
    drawn(small, models.spec(name, arguments))
    torch.manual_seed(5)
    assert same(small, models.build(name, **at_widths))


OWN = [
    ("vgg", {"depth": 11, "width": 0.5}),
    ("preresnet", {"depth": 20}),
    ("densenet", {"depth": 13}),
    ("convnet", {"width": 0.25}),
]


@pytest.mark.parametrize(("name", "arguments"), OWN)
@pytest.mark.parametrize("ties", ["together", "apart", "aligned"])
def test_the_papers_initialisation_at_the_thin_widths(name, arguments, ties):
    """gamma_init, beta 0, statistics as new, convolutions N(0, sqrt(2 / (k*k*c_out))), the head N(0, 0.01)."""
    dense = models.build(name, **arguments)
    small = thin(dense, ties=ties)
    for tensor in small.state_dict().values():
        tensor.fill_(9)  # it was trained
    drawn(small, models.spec(name, arguments))
    convolutions = [m for m in small.modules() if isinstance(m, nn.Conv2d)]
    assert sum(m.out_channels for m in convolutions) < sum(
        m.out_channels for m in dense.modules() if isinstance(m, nn.Conv2d)
    )
    for module in convolutions:
        assert_spread(module.weight, math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels)))
    for module in small.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            values = (module.weight, 0.5), (module.bias, 0), (module.running_mean, 0), (module.running_var, 1)
            assert all((tensor == value).all() for tensor, value in values) and module.num_batches_tracked == 0
        elif isinstance(module, nn.Linear):
            assert_spread(module.weight, 0.01)


def assert_spread(weight: torch.Tensor, expected: float) -> None:
    """The relative error of an estimated deviation is about sqrt(1 / 2n)."""
    assert abs(weight.std() / expected - 1) < 5 * (2 * weight.numel()) ** -0.5


def fan(weight: torch.Tensor, out: bool) -> int:
    return weight[0, 0].numel() * weight.shape[0 if out else 1]


FAMILIES = {  # the deviation of a convolution's weights in torchvision's constructors
    "resnet18": lambda w: math.sqrt(2 / fan(w, True)),
    "mobilenet_v2": lambda w: math.sqrt(2 / fan(w, True)),
    "regnet_y_400mf": lambda w: math.sqrt(2 / fan(w, True)),
    "efficientnet_b0": lambda w: math.sqrt(2 / fan(w, True)),
    "densenet121": lambda w: math.sqrt(2 / fan(w, False)),
    "shufflenet_v2_x0_5": lambda w: math.sqrt(1 / 3 / fan(w, False)),
    "googlenet": lambda w: 0.01,
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "resnet18" else pytest.mark.slow) for n in FAMILIES])
def test_torchvisions_own_initialisation_at_the_thin_widths(name):
    arguments = {"name": name, "num_classes": 7}
    small = drawn(thin(models.build("torchvision", **arguments), 64), models.spec("torchvision", arguments))
    for module in small.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 100:
            assert_spread(module.weight, FAMILIES[name](module.weight))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert (module.weight == 1).all() and (module.bias == 0).all()


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "resnet18", "num_classes": 7, "in_channels": 1, "gamma_init": 0.5},
        {"name": "squeezenet1_1", "num_classes": 7, "in_channels": 4},
        pytest.param({"name": "googlenet", "in_channels": 1}, marks=pytest.mark.slow),
        pytest.param({"name": "maxvit_t"}, marks=pytest.mark.slow),
        pytest.param({"name": "mobilenet_v3_small", "num_classes": 1000, "in_channels": 2}, marks=pytest.mark.slow),
    ],
    ids=lambda a: a["name"],
)
def test_a_network_that_was_not_pruned_gets_what_its_factory_draws(arguments):
    trained = models.build("torchvision", **arguments)
    with torch.no_grad():
        for tensor in (*trained.parameters(), *trained.buffers()):
            tensor.add_(1)
    spec = models.spec("torchvision", arguments)
    torch.manual_seed(5)
    fresh = models.build("torchvision", **arguments)
    for name, parameter in drawn(trained, spec).named_parameters():
        assert torch.equal(parameter, fresh.get_parameter(name)), name


def test_other_first_and_last_layers_are_drawn_at_the_thin_widths_too():
    arguments = {"name": "resnet18", "num_classes": 7, "in_channels": 1, "gamma_init": 0.5}
    small = thin(models.build("torchvision", **arguments), 64, channels=1)
    assert small.conv1.out_channels < 64 and small.fc.in_features < 512
    drawn(small, models.spec("torchvision", arguments))
    assert_spread(
        small.conv1.weight, math.sqrt(3) * math.sqrt(2 / (49 * small.conv1.out_channels))
    )  # three colours, summed
    assert_spread(small.fc.weight, math.sqrt(1 / 3 / small.fc.in_features))
    assert all((m.weight == 0.5).all() for m in small.modules() if isinstance(m, nn.BatchNorm2d))


def test_weights_that_a_network_began_with_are_not_fetched_again(monkeypatch):
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *a, **k: pytest.fail("fetched"))
    arguments = {"name": "mobilenet_v3_small", "weights": "DEFAULT"}
    model = models.build("torchvision", name="mobilenet_v3_small")
    drawn(model, {"name": "torchvision", "arguments": arguments})


@pytest.mark.parametrize("begin", [torch.ones, torch.randn])
def test_a_parameter_that_a_factory_makes_by_hand_keeps_its_one_number_or_is_named(begin):
    """One for all channels is one for fewer; other values belong to channels that are no longer there."""

    def factory():
        layers = [nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), Scaled(40, begin), nn.Conv2d(40, 5, 3), nn.BatchNorm2d(5)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    small = thin(factory(), 16)
    assert small[2].scale.shape[1] < 40
    if begin is torch.randn:
        with pytest.raises(ConfigError, match=r"nothing draws the parameter 2\.scale"):
            redraw_as_built(small, factory)
    else:
        nn.init.constant_(small[2].scale, 9)
        redraw_as_built(small, factory)
        assert (small[2].scale == 1).all()


# --- networks that are not registered ---------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Holds a parameter itself."""

    def __init__(self, channels: int, begin=torch.ones):
        super().__init__()
        self.scale = nn.Parameter(begin(1, channels, 1, 1))

    def forward(self, x):
        return x * self.scale


def own(*middle: nn.Module) -> nn.Sequential:
    """A network that comes trained: every weight is 9."""
    layers = [
        nn.Conv2d(3, 40, 3),
        nn.BatchNorm2d(40),
        nn.ReLU(),
        nn.Conv2d(40, 40, 3, groups=2),
        nn.BatchNorm2d(40),
        *middle,
    ]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(40), nn.Linear(40, 5))
    for tensor in model.state_dict().values():
        tensor.fill_(9)
    return model


@pytest.mark.parametrize("ties", ["together", "apart"])
def test_every_layer_of_another_network_is_reset_at_its_widths(ties):
    small = drawn(thin(own(), 16, ties=ties), None)
    assert small[0].out_channels < 40
    for layer in (small[0], small[3], small[-1]):
        assert_spread(layer.weight, math.sqrt(1 / 3 / math.prod(layer.weight.shape[1:])))
    for norm in (small[1], small[4]):
        assert (norm.weight == 1).all() and (norm.running_mean == 0).all() and norm.num_batches_tracked == 0


def test_a_parameter_that_nothing_draws_is_named():
    words = r"nothing draws the parameter 5\.scale: give its Scaled a method reset_parameters\(\)"
    with pytest.raises(ConfigError, match=words):
        drawn(thin(own(Scaled(40)), 16), None)


@pytest.mark.parametrize("method", ["reset_parameters", "init_weights"])
def test_a_module_that_draws_its_parameters_is_asked(method):
    kind = type("Own", (Scaled,), {method: lambda self, gain=2.0: nn.init.constant_(self.scale, gain)})
    small = drawn(thin(own(kind(40)), 16), None)
    assert (small[5].scale == 2).all()


def test_a_module_speaks_last_for_what_it_holds():
    class Net(nn.Sequential):
        def init_weights(self):
            nn.init.constant_(self[0].weight, 3)

        def reset_parameters(self, gain):
            raise AssertionError("it wants to be told more")

    small = drawn(Net(*own()), None)
    assert (small[0].weight == 3).all() and small[-1].weight.std() < 1


def test_attention_and_embeddings_are_reset():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.attention = nn.Embedding(50, 8), nn.MultiheadAttention(8, 2)

    net = Net()
    for tensor in net.state_dict().values():
        tensor.fill_(9)
    drawn(net, None)
    assert_spread(net.table.weight, 1)
    assert_spread(net.attention.in_proj_weight, math.sqrt(2 / (8 + 24)))
