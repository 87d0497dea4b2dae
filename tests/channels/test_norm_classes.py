"""BatchNorm subclasses with a forward of their own: they select and scatter around their batch_norm, or stay whole."""

import copy
import pickle

import pytest
import torch
from exactness import assert_exact, randomise
from torch import nn
from torch.nn import functional as F

import slimming
from slimming.channels.layers import SelectBatchNorm, set_indices, synchronise
from slimming.errors import GraphError

IMAGE = torch.randn(1, 3, 8, 8, dtype=torch.float64)


class Activated(nn.BatchNorm2d):
    """BatchNorm and an activation that is not zero at zero, as timm's BatchNormAct2d."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.Sigmoid()

    def forward(self, x):
        training = self.training or self.running_mean is None
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training, self.momentum, self.eps
        )
        return self.act(x)


class InPlace(nn.BatchNorm2d):
    def forward(self, x):
        return F.leaky_relu_(super().forward(x), 0.01)


class Positional(nn.BatchNorm2d):
    """Calls the operator of torch itself, whose arguments have another order."""

    def forward(self, x):
        training = self.training
        return torch.batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var, training, self.momentum, self.eps, False
        )


class Ghost(nn.BatchNorm2d):
    """Normalises every item of the batch by itself while it trains."""

    def forward(self, x):
        parts = x.chunk(x.shape[0] if self.training else 1, 0)
        return torch.cat([super(Ghost, self).forward(part) for part in parts], 0)


class Split(nn.BatchNorm2d):
    """Normalises the second half of a training batch by weights of its own, as timm's SplitBatchNorm2d."""

    def __init__(self, channels):
        super().__init__(channels)
        self.second = nn.BatchNorm2d(channels)

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        first, second = x.chunk(2, 0)
        return torch.cat((super().forward(first), self.second(second)), 0)


class Synchronised(nn.SyncBatchNorm):
    def forward(self, x):
        return F.relu(super().forward(x))


class QuantisationReady(nn.BatchNorm2d):
    """Rounds its output to a grid, as when it is trained for int8."""

    def forward(self, x):
        return torch.round(super().forward(x) * 64) / 64


class RepeatedWeights(nn.BatchNorm2d):
    """The ghost batch norm of the speed records: in train mode the batch's groups become channels, the weights repeat."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        groups, (n, c, h, w) = 2, x.shape
        y = F.batch_norm(
            x.reshape(n // groups, groups * c, h, w),
            None,
            None,
            self.weight.repeat(groups),
            self.bias.repeat(groups),
            True,
        )
        return y.reshape(n, c, h, w)


class ByHand(nn.BatchNorm2d):
    """Does not call batch_norm at all."""

    def forward(self, x):
        mean, std = (t[:, None, None] for t in (self.running_mean, (self.running_var + self.eps).sqrt()))
        return (x - mean) / std * self.weight[:, None, None] + self.bias[:, None, None]


SERVED = [Activated, InPlace, Positional, Ghost, Split, Synchronised, QuantisationReady]


class Residual(nn.Module):
    """A chain, and a residual block whose two sides lose other channels: it selects (before) and places (after)."""

    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1), norm(8)
        self.before, self.conv, self.after = norm(8), nn.Conv2d(8, 8, 3, padding=1), norm(8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.stem_norm(self.stem(x))
        return self.head(x + self.after(self.conv(self.before(x))))


@pytest.mark.parametrize("norm", SERVED, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("ties", ["together", "apart", "aligned"])
def test_served_classes_are_exact(norm, ties):
    model = randomise(Residual(norm))
    graph = slimming.trace(model, IMAGE)
    assert not graph.tape.fixed and graph.candidates("apart").all()
    if norm is Activated and ties != "apart":  # behind a sigmoid nothing is zero
        assert not graph.candidates(ties).any()
        return
    plan = graph.plan(slimming.GlobalRatio(0.4), ties=ties)
    thin = assert_exact(model, plan, IMAGE)
    slimming.prune(model, plan)
    assert plan.got["removed"] > 0 and all(isinstance(m, norm) for m in (thin.stem_norm, thin.before, thin.after))
    if ties == "apart":
        assert any(isinstance(m, SelectBatchNorm) and m.select is not None for m in thin.modules())
        assert any(isinstance(m, SelectBatchNorm) and m.scatter is not None for m in thin.modules())


@pytest.mark.parametrize(
    ("norm", "reason"),
    [(RepeatedWeights, "on its own weights in train mode"), (ByHand, "on its own weights in eval mode")],
)
def test_a_class_that_is_not_served_stays_whole_with_its_reason(norm, reason):
    model = randomise(Residual(norm))
    model.stem_norm = nn.BatchNorm2d(8).double()
    graph = slimming.trace(model, IMAGE)
    assert reason in graph.tape.fixed["before"] and any(reason in line for line in graph.describe().splitlines())
    assert not graph.candidates("apart")[graph.norms["before"].all].any() if "before" in graph.norms else True
    for ties in ("together", "apart", "aligned"):
        try:
            plan = graph.plan(slimming.GlobalRatio(0.5), ties=ties)
        except GraphError as error:
            assert ties != "apart" and "no BatchNorm scale can go" in str(error)
            continue
        assert_exact(model, plan, IMAGE, train=norm is ByHand)
        assert "before" not in plan.keep and "after" not in plan.keep


def test_weights_used_outside_of_their_module_stay_whole():
    class Outside(Residual):
        def forward(self, x):
            x = self.stem_norm(self.stem(x))
            norm = self.before
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
            return self.head(self.after(self.conv(x)))

    model = randomise(Outside(nn.BatchNorm2d))
    graph = slimming.trace(model, IMAGE)
    assert "outside of its forward" in graph.tape.fixed["before"]
    assert_exact(model, graph.plan(slimming.GlobalRatio(0.5), ties="apart"), IMAGE)


def test_a_lazy_batchnorm_is_one_clear_error_until_it_has_run():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Conv2d(8, 2, 1)).double()
    with pytest.raises(GraphError, match=r"1 \(LazyBatchNorm2d\) has no sizes yet: run the network once"):
        slimming.trace(model, IMAGE)
    model(IMAGE)
    assert_exact(model, slimming.trace(randomise(model), IMAGE).plan(slimming.GlobalRatio(0.5)), IMAGE)


def thin_apart(norm=Activated):
    model = randomise(Residual(norm))
    return slimming.prune(model, slimming.trace(model, IMAGE).plan(slimming.GlobalRatio(0.4), ties="apart"))


def test_copies_pickles_and_state_dicts_keep_what_a_norm_does():
    thin = thin_apart().eval()
    expected = thin(IMAGE)
    assert torch.equal(copy.deepcopy(thin)(IMAGE), expected)
    assert torch.equal(pickle.loads(pickle.dumps(thin))(IMAGE), expected)
    other = copy.deepcopy(thin)
    for p in other.parameters():
        nn.init.zeros_(p)
    other.load_state_dict(thin.state_dict())
    assert torch.equal(other(IMAGE), expected)
    assert not any("select" in key or "scatter" in key for key in thin.state_dict())
    assert torch.allclose(thin.to(memory_format=torch.channels_last)(IMAGE), expected, rtol=1e-12)
    assert "select=" in repr(thin) and "Activated" in repr(thin)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_it_compiles_without_a_graph_break(training):
    thin = thin_apart().float().train(training)
    batch = torch.randn(4, 3, 8, 8)
    expected = copy.deepcopy(thin)(batch)
    torch.testing.assert_close(torch.compile(copy.deepcopy(thin), fullgraph=True)(batch), expected)


def test_indices_come_and_go():
    norm = Activated(4)
    set_indices(norm, torch.tensor([1, 3, 5, 7]), None, 4)
    assert norm(torch.randn(2, 8, 3, 3)).shape == (2, 4, 3, 3)
    set_indices(norm, None, None, 4)
    assert type(norm) is Activated and norm(torch.randn(2, 4, 3, 3)).shape == (2, 4, 3, 3)


def test_a_forward_that_stops_calling_batch_norm_is_an_error_not_a_wrong_answer():
    norm = ByHand(4)
    set_indices(norm, torch.arange(4), None, 4)
    with pytest.raises(RuntimeError, match="did not call batch_norm on its own weights"):
        norm(torch.randn(2, 4, 3, 3))


def test_synchronised_norms_keep_their_forward():
    thin = thin_apart().eval()
    expected, parameters = thin(IMAGE), list(thin.parameters())
    assert synchronise(thin) is thin and torch.equal(thin(IMAGE), expected)
    assert all(a is b for a, b in zip(parameters, thin.parameters(), strict=True))
    assert all(m.synchronised for m in thin.modules() if isinstance(m, Activated))
    plain = nn.Sequential(nn.BatchNorm2d(3))
    assert isinstance(synchronise(plain)[0], nn.SyncBatchNorm)
