"""Random small networks: whatever one composes, prune equals mask."""

import pytest
import torch
from exactness import assert_exact, empty_sides, randomise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import slimming
from slimming.errors import GraphError

OPERATIONS = """
    conv conv_bn conv_bn_act pre_act depthwise depthwise_bn grouped grouped_bn transposed bn act add add_self gate
    gate_elsewhere cat cat_self chunk chunk_swap shuffle shared shared_bn pool scale shift space_gate
""".split()  # noqa: SIM905
ACTIVATIONS = [F.relu, F.silu, F.hardswish, torch.sigmoid, torch.tanh, F.gelu, F.leaky_relu, F.hardsigmoid, F.softplus]
program = st.lists(
    st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 11), st.integers(0, 8)), min_size=2, max_size=12
)


class Net(nn.Module):
    """Runs a program of (operation, size, choice) on a stack of feature maps (N, C, 6, 6), then flattens or pools."""

    def __init__(self, steps, flat: bool, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.steps, self.flat = steps, flat
        self.layers, self.choices = nn.ModuleDict(), {}
        self.building = True
        with torch.no_grad():
            self(torch.zeros(1, 3, 6, 6))
        self.building = False

    def decide(self, key, value):
        """Control flow that depends on widths is settled when the network is built, as an author would."""
        return self.choices.setdefault(key, value)

    def layer(self, key, make):
        if self.building and key not in self.layers:
            self.layers[key] = make().eval()
        return self.layers[key]

    def conv(self, key, x, width, kernel=1, **kwargs):
        return self.layer(key, lambda: nn.Conv2d(x.shape[1], width, kernel, padding=kernel // 2, **kwargs))(x)

    def bn(self, key, x):
        return self.layer(key, lambda: nn.BatchNorm2d(x.shape[1]))(x)

    def step(self, i, x, maps, operation, size, choice):
        width, act, bias = 4 + 2 * (size % 5), ACTIVATIONS[choice % len(ACTIVATIONS)], bool(choice % 2)
        other, k, c = maps[size % len(maps)], f"{i}", x.shape[1]
        even, fits = self.decide(k + "even", c % 2 == 0), self.decide(k + "fits", other.shape[1] == c)
        match operation:
            case "conv":
                return self.conv(k, x, width, 3, bias=bias)
            case "conv_bn":
                return self.bn(k + "b", self.conv(k, x, width, 3, bias=bias))
            case "conv_bn_act":
                return act(self.bn(k + "b", self.conv(k, x, width, bias=bias)))
            case "pre_act":
                return self.conv(k, act(self.bn(k + "b", x)), width, bias=bias)
            case "depthwise" | "depthwise_bn":
                y = self.conv(k, x, c * (1 + choice % 2), 3, groups=c, bias=bias)
                return self.bn(k + "b", y) if operation.endswith("bn") else y
            case "grouped" | "grouped_bn":
                y = self.conv(k, x, width, groups=2, bias=bias) if even else x
                return self.bn(k + "b", y) if operation.endswith("bn") else y
            case "transposed":
                return self.layer(k, lambda: nn.ConvTranspose2d(c, width, 3, padding=1, bias=bias))(x)
            case "bn":
                return self.bn(k, x)
            case "act":
                return act(x)
            case "add":
                return x + (other if fits else self.bn(k + "b", self.conv(k, other, c, bias=False)))
            case "add_self":
                return x + act(x)
            case "gate" | "gate_elsewhere":
                hidden = act(self.conv(k, x.mean((2, 3), keepdim=True), 4))
                gate = torch.sigmoid(self.conv(k + "g", hidden, c))
                y = x * gate
                return torch.cat((y, gate.expand_as(x)), 1) if operation.endswith("where") else y
            case "cat":
                return torch.cat((x, other), 1)
            case "cat_self":
                return torch.cat((act(x), x), 1)
            case "chunk":
                return x.chunk(2, 1)[choice % 2] if even else x
            case "chunk_swap":
                if not even:
                    return x
                a, b = x.chunk(2, 1)
                return torch.cat((act(b), a), 1)
            case "shuffle":
                n, _, h, w = x.shape
                return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w) if even else x
            case "shared" | "shared_bn":
                for _ in range(2):
                    x = self.conv(k, x, c, bias=bias)
                    x = self.bn(k + "b", x) if operation.endswith("bn") else x
                return x
            case "pool":
                return F.max_pool2d(x, 3, 1, 1) if bias else F.avg_pool2d(x, 3, 1, 1)
            case "scale":
                return x * 0.5
            case "shift":
                return x + 0.5
            case "space_gate":
                return x * torch.sigmoid(self.conv(k, x, 1))
        raise AssertionError(operation)

    def forward(self, x):
        maps = [self.conv("stem", x, 8, 3)]
        for i, (operation, size, choice) in enumerate(self.steps):
            y = self.step(i, maps[-1], maps, operation, size, choice)
            maps.append(y if self.decide(f"{i}wide", y.shape[1] <= 64) else self.conv(f"{i}narrow", y, 16))
        x = maps[-1].flatten(1) if self.flat else maps[-1].mean((2, 3))
        return self.layer("head", lambda: nn.Linear(x.shape[1], 3))(x)


@pytest.mark.slow
@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(program, st.booleans(), st.sampled_from([0.2, 0.5, 0.8, 0.99]), st.integers(1, 3))
def test_pruned_equals_masked(steps, flat, ratio, min_channels):
    model = randomise(Net(steps, flat, seed=0))
    example = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    graph = slimming.trace(model, example)
    assert not graph.unknown and graph.train_reason == ""
    for ties in ("together", "apart"):
        try:
            plan = graph.plan(slimming.GlobalRatio(ratio), ties=ties, min_channels=min_channels)
        except GraphError:
            assert ties == "together" or not graph.norms
            continue
        thin = assert_exact(model, plan, example)
        assert not empty_sides(thin)
        for name, norm in graph.norms.items():
            assert thin.get_submodule(name).num_features >= min(min_channels, norm.module.num_features)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(program, st.booleans(), st.integers(0, 5))
def test_planted_channels_go_and_change_nothing(steps, flat, seed):
    model = randomise(Net(steps, flat, seed=0))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                dead = torch.rand(module.num_features, generator=generator) < 0.4
                module.weight[dead], module.bias[dead] = 0, 0
    example = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    graph = slimming.trace(model, example)
    if not graph.norms:
        return
    thin = slimming.prune(model, graph.plan(slimming.Threshold(0.0), ties="apart"))
    with torch.no_grad():
        torch.testing.assert_close(thin.eval()(example), model.eval()(example), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(program, st.booleans(), st.sampled_from(["together", "apart"]))
def test_pruned_networks_are_pruned_again(steps, flat, ties):
    model = randomise(Net(steps, flat, seed=0))
    example = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    for ratio in (0.4, 0.5):
        try:
            plan = slimming.trace(model, example).plan(slimming.GlobalRatio(ratio), ties=ties)
        except GraphError:
            return
        model = assert_exact(model, plan, example)
