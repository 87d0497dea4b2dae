"""Every network of models/, pruned at every ratio: equal to the masked one, nothing dead left, able to train."""

import re

import pytest
import torch
from exactness import NORM, assert_exact, empty_sides, randomise, widen
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import slimming
from slimming import models
from slimming.channels.embedding import selecting
from slimming.errors import GraphError

NETS = {
    "vgg11": ("vgg", {"depth": 11, "width": 0.25}),
    "vgg19": ("vgg", {"depth": 19, "width": 0.25}),
    "preresnet20": ("preresnet", {"depth": 20}),
    "preresnet56": ("preresnet", {"depth": 56, "width": 0.5}),
    "densenet22": ("densenet", {"depth": 22, "growth": 6}),
    "densenet40": ("densenet", {"depth": 40}),
    "convnet": ("convnet", {"width": 0.125}),
    "mlp": ("mlp", {}),
}
FULL = {"vgg19": ("vgg", {}), "preresnet164": ("preresnet", {}), "convnet": ("convnet", {})}


def build(name: str, nets=NETS):
    torch.manual_seed(0)
    model = randomise(models.build(nets[name][0], **nets[name][1]))
    shape = (1, 1, 28, 28) if name == "mlp" else (1, 3, 32, 32)
    return model, torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("ties", ["together", "apart", "aligned"])
@pytest.mark.parametrize("name", NETS)
def test_pruned_equals_masked(name, ties):
    model, example = build(name)
    graph = slimming.trace(model, example, strict=True)
    before = None
    for ratio in (0.1, 0.5, 0.9, 0.99):
        plan = graph.plan(slimming.GlobalRatio(ratio), ties=ties)
        thin = assert_exact(model, plan, example)
        assert not empty_sides(thin)
        chosen, wanted = plan.got["removed"] + plan.got["restored"], int(ratio * plan.got["candidates"] + 1e-9)
        assert chosen == wanted or (ties == "aligned" and chosen > wanted)  # there classes go as a whole
        assert ties != "aligned" or not selecting(thin)
        gone = {(n, i) for n, keep in plan.keep.items() for i in set(range(plan.layers[n].size[1])) - set(keep)}
        assert before is None or before <= gone, "what a ratio removes a higher ratio removes, too"
        before = gone


@pytest.mark.slow
@pytest.mark.parametrize("ties", ["together", "apart", "aligned"])
@pytest.mark.parametrize("name", FULL)
def test_pruned_equals_masked_at_full_width(name, ties):
    model, example = build(name, FULL)
    graph = slimming.trace(model, example, strict=True)
    for ratio in (0.1, 0.5, 0.9, 0.99):
        assert_exact(model, graph.plan(slimming.GlobalRatio(ratio), ties=ties), example, train=ratio == 0.5)


@pytest.mark.parametrize("name", NETS)
def test_cost_of_the_pruned_network(name):
    """The analytic cost of a plan, the counter and torch's own counter agree."""
    model, example = build(name)
    dense = slimming.cost(model, example)
    plan = slimming.trace(model, example).plan(slimming.GlobalRatio(0.6), ties="apart")
    thin = slimming.prune(model, plan)
    counted = slimming.cost(thin, example)
    with FlopCounterMode(display=False) as counter:
        thin.eval()(example)
    assert counted.macs * 2 == counter.get_total_flops()
    assert counted.num_params == sum(p.numel() for p in thin.parameters())
    assert plan.got["macs"] == pytest.approx(counted.macs / dense.macs, rel=1e-12)
    assert plan.got["params"] == pytest.approx(counted.num_params / dense.num_params, rel=1e-12)


@pytest.mark.parametrize("ties", ["together", "aligned"])
@pytest.mark.parametrize("name", NETS)
def test_nothing_dead_is_left(name, ties, monkeypatch):
    """Independent of the graph: the output's gradient reaches every channel that any layer still writes."""
    # A ReLU would silence living channels on these random statistics.
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: F.leaky_relu(x, 0.1))
    model, example = build(name)
    plan = slimming.trace(model, example).plan(slimming.GlobalRatio(0.5), ties=ties)
    thin = slimming.prune(model, plan).eval()
    seen: dict[str, torch.Tensor] = {}

    def watch(layer_name):
        def hook(module, args, out):
            out.retain_grad()
            seen[layer_name] = out

        return hook

    for layer_name, module in thin.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(watch(layer_name))
    images = widen(example, 16).requires_grad_()
    weight = torch.randn(10, dtype=torch.float64)
    (thin(images) * weight).sum().backward()
    alive: dict[str, torch.Tensor] = {}
    for layer_name, out in seen.items():
        channel = out.grad.abs().transpose(0, 1).flatten(1).sum(1) > 0
        # The summands of a residual stream have one width: a channel stays while any of them is needed.
        stream = re.sub(r"^(layer\d)\.\d+\.(conv3|downsample\.0)$", r"\1", layer_name)
        alive[stream] = alive[stream] | channel if stream in alive else channel
    assert len(alive) > 2
    for layer_name, channel in alive.items():
        assert channel.all(), f"{layer_name} has dead channels {(~channel).nonzero().flatten().tolist()}"


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=1e-3), torch.optim.Adam])
@pytest.mark.parametrize("name", ["vgg11", "preresnet20", "densenet22"])
def test_training_goes_on_as_in_the_masked_network(name, make):
    """A step before and two after pruning, with the optimizer state sliced: the kept parameters stay equal."""
    model, example = build(name)
    names = [n for n, _ in model.named_parameters()]
    optimizer = make(model.parameters())

    def step(network, opt):
        opt.zero_grad()
        F.cross_entropy(network.train()(widen(example, 8)), torch.arange(8) % 10).backward()
        opt.step()

    step(model, optimizer)
    plan = slimming.trace(model, example).plan(slimming.GlobalRatio(0.5), ties="apart")
    thin, dense = slimming.prune(model, plan), slimming.mask(model, plan)
    optimizers = make(thin.parameters()), make(dense.parameters())
    optimizers[0].load_state_dict(slimming.prune_optimizer_state(optimizer.state_dict(), model, plan, names))
    optimizers[1].load_state_dict(optimizer.state_dict())
    frozen = {n: [i for i in range(plan.layers[n].size[1]) if i not in set(k)] for n, k in plan.keep.items()}

    def hold(parameter, gone):  # the specification keeps pruned channels at zero: no gradient, no momentum
        parameter.register_hook(lambda grad: grad.index_fill(0, torch.tensor(gone), 0))

    for layer, gone in frozen.items():
        for attribute in ("weight", "bias"):
            parameter = getattr(dense.get_submodule(layer), attribute)
            hold(parameter, gone)
            state = optimizers[1].state[parameter]
            for value in state.values():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    value[gone] = 0
    for _ in range(2):
        for network, opt in zip((thin, dense), optimizers, strict=True):
            step(network, opt)
    after = dict(dense.named_parameters())
    for key, value in thin.named_parameters():
        layer = plan.layers.get(key.rpartition(".")[0])
        expected = after[key]
        if layer is not None:
            expected = expected[layer.outs]
            if expected.ndim > 1:
                expected = expected[:, layer.ins]
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("ties", ["together", "apart", "aligned"])
@pytest.mark.parametrize("name", NETS)
def test_a_pruned_network_can_be_pruned_again(name, ties):
    model, example = build(name)
    for ratio in (0.3, 0.5):
        plan = slimming.trace(model, example).plan(slimming.GlobalRatio(ratio), ties=ties)
        model = assert_exact(model, plan, example)
    assert plan.got["removed"] > 0


@pytest.mark.parametrize("name", NETS)
def test_the_network_is_not_changed(name):
    model, example = build(name)
    model.train()
    model.register_forward_hook(lambda *a: None)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    plan = slimming.trace(model, example).plan(slimming.GlobalRatio(0.5))
    slimming.prune(model, plan)
    slimming.mask(model, plan)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules()) and all(p.grad is None for p in model.parameters())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert not any(p.is_inference() for p in model.parameters())


@pytest.mark.parametrize("name", ["vgg11", "preresnet20", "densenet22", "mlp"])
def test_planted_channels(name):
    model, example = build(name)
    generator = torch.Generator().manual_seed(3)
    planted = plant(model, generator)
    graph = slimming.trace(model, example)
    check_planted(model, graph, planted, example)


def plant(model, generator, share=0.4) -> dict[str, set[int]]:
    """Set gamma and beta of a share of every BatchNorm to 0, by layer; keep the others away from 0."""
    planted = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, NORM):
                n = module.num_features
                dead = torch.randperm(n, generator=generator)[: int(share * n)]
                module.weight.copy_(module.weight.sign() * module.weight.abs().clamp_min(0.1))
                module.weight[dead], module.bias[dead] = 0, 0
                planted[name] = set(dead.tolist())
    return planted


def check_planted(model, graph, planted, example):
    """Threshold leaves the function as it is and, apart, no planted channel; GlobalRatio(k/N) apart takes just these."""
    with torch.no_grad():
        expected = model.eval()(widen(example, 2))
        for ties in ("together", "aligned", "apart"):
            try:
                plan = graph.plan(slimming.Threshold(1e-6), ties=ties)
            except GraphError:  # of together and aligned: nothing may go
                assert ties != "apart"
                continue
            if plan.zeroed:  # what a convolution reads without a BatchNorm has no gamma to be planted
                continue
            thin = slimming.prune(model, plan).eval()
            error = float((thin(widen(example, 2)) - expected).abs().max() / expected.abs().max())
            assert error <= 1e-9
    for name, dead in planted.items():
        keep = set(plan.keep.get(name, range(model.get_submodule(name).num_features)))
        assert not keep & dead, f"{name}: planted channels stand"
    k, n = sum(map(len, planted.values())), graph.count
    ratio = graph.plan(slimming.GlobalRatio(k / n), ties="apart")
    assert ratio.keep == plan.keep and ratio.got["removed"] == k
