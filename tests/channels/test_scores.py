"""Scores of channels, against closed forms and brute force."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slimming
from slimming import models
from slimming.channels.graph.candidates import decided_together, trainable_gammas
from slimming.channels.graph.deciding import make_choice, unit_macs
from slimming.channels.graph.liveness import solve
from slimming.channels.graph.scores import reconstruction as module
from slimming.channels.graph.scores.reconstruction import Reader
from slimming.channels.repair.refit import RIDGE
from slimming.errors import ConfigError, GraphError


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Chain(nn.Module):
    """Two convolutions with BatchNorms, and a linear layer that reads every channel at 4 positions."""

    def __init__(self, width=5):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        return self.head(F.adaptive_avg_pool2d(F.relu(self.norm2(self.conv2(x))), 2).flatten(1))


def settled(model, images, seed=0):
    """Give a network gammas and betas of many sizes, and the statistics of the images."""
    generator = torch.Generator().manual_seed(seed)
    model.double()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.weight.data.uniform_(0.02, 1, generator=generator)
        norm.bias.data.uniform_(-0.2, 0.5, generator=generator)
    return slimming.calibrate(model, [images])


@pytest.fixture
def images():
    return draw(40, 3, 8, 8)


@pytest.fixture
def chain(images):
    torch.manual_seed(0)
    return settled(Chain(), images)


# --- lamp -------------------------------------------------------------------------------------------------------------


def with_gammas(first, second):
    model = Chain(len(first))
    model.norm1.weight.data, model.norm2.weight.data = torch.tensor(first), torch.tensor(second)
    return slimming.trace(model, torch.zeros(1, 3, 8, 8))


def test_lamp_by_hand():
    graph = with_gammas([2.0, -1.0, 0.0, 1.0, 3.0], [0.0, 0.0, 0.0, 0.0])
    expected = [4 / 13, 1 / 15, 0.0, 1 / 14, 1.0]  # of equal ones the first comes first; squares 0 1 1 4 9
    assert graph.scores("lamp").tolist() == pytest.approx([*expected, 0, 0, 0, 0], abs=1e-15)


def test_the_largest_of_every_layer_scores_one_by_lamp():
    graph = with_gammas([0.5, 0.1, 0.3, 0.2, 0.4], [5e-4, 1e-4, 3e-4, 2e-4])
    scores = graph.scores("lamp")
    assert scores[0] == scores[5] == 1 and scores.sort().values[-3] < 1
    plan = graph.plan(slimming.GlobalRatio(0.75), score="lamp")
    assert plan.keep == {"norm1": [0, 4], "norm2": [0]} and plan.got["restored"] == 0
    assert plan.asked["score"] == "lamp"


# --- reconstruction ---------------------------------------------------------------------------------------------------


def rest(gram, weight, kept, ridge):
    """Return what is left of |Xw - X_kept v|^2 + ridge |w - v|^2 at the best v, by lstsq, (outputs,)."""
    ridged = gram + ridge * torch.eye(len(gram), dtype=gram.dtype)
    root = torch.linalg.cholesky(ridged).mT  # instead of X and the ridge as rows: R'R = X'X + ridge
    target = root @ weight.mT
    found = torch.linalg.lstsq(root[:, kept], target).solution
    return (target - root[:, kept] @ found).square().sum(0)


def test_what_a_channel_costs_is_what_the_best_refit_leaves():
    x, weight = draw(60, 12), draw(4, 12, seed=1)
    x[:, 3:6] += x[:, 6:9]
    inputs, gram = torch.tensor([0, 0, 7, 5, 5, 5, 7, 2, 2, 2, 2, 7]), x.mT @ x / 60  # 0 is frozen; sizes 2, 3, 3, 4
    reader = Reader(inputs, gram + 0.01 * torch.eye(12, dtype=torch.float64), weight)
    gone = []
    for step in (5, 2):
        components, costs = reader.costs
        already = rest(gram, weight, ~torch.isin(inputs, torch.tensor(gone)), 0.01) if gone else torch.zeros(4).double()
        for component, cost in zip(components.tolist(), costs.tolist(), strict=True):
            if component:
                kept = ~torch.isin(inputs, torch.tensor([*gone, component]))
                whole = rest(gram, weight, kept, 0.01)
                assert cost == pytest.approx(float((whole - already).sum()), rel=1e-8)
        reader.take_out(torch.tensor([step]))
        gone.append(step)


def test_the_scores_are_those_of_the_cheapest_order(chain, images):
    """Brute force: the inputs unfolded, every candidate tried by lstsq, the cheapest removed, and again."""
    found = slimming.trace(chain, images[:1]).scores("reconstruction", batches=[images])
    with torch.no_grad():
        hidden = F.relu(chain.norm1(chain.conv1(images)))
        pooled = F.adaptive_avg_pool2d(F.relu(chain.norm2(chain.conv2(hidden))), 2)
    rows = F.unfold(hidden, 3, padding=1).transpose(1, 2).reshape(-1, 45)
    cases = [(rows, chain.conv2, 9, found[:5]), (pooled.flatten(1), chain.head, 4, found[5:])]
    for x, layer, taps, scores in cases:
        weight = layer.weight.detach().flatten(1)
        x = x - x.mean(0)
        gram, channel = x.mT @ x, torch.arange(x.shape[1]) // taps
        gone, expected, before, ridge = [], {}, 0.0, RIDGE * float(gram.diagonal().mean())
        power = float((x @ weight.mT).square().sum() + ridge * weight.square().sum())
        while len(gone) < len(scores):
            left = [c for c in range(len(scores)) if c not in gone]
            tries = {c: ~torch.isin(channel, torch.tensor([*gone, c])) for c in left}
            costs = {c: float(rest(gram, weight, kept, ridge).sum()) / power for c, kept in tries.items()}
            best = min(costs, key=costs.get)
            expected[best] = max(costs[best] - before, *expected.values(), 0.0)
            before = costs[best]
            gone.append(best)
        assert scores.argsort().tolist() == gone
        assert scores.tolist() == pytest.approx([expected[c] for c in range(len(scores))], rel=1e-6)


def test_of_two_equal_channels_one_is_cheap(images):
    torch.manual_seed(0)
    model = Chain()
    for layer in (model.conv1, model.norm1):
        layer.weight.data[1] = layer.weight.data[0]
    model = settled(model, images)
    for tensor in (model.norm1.weight, model.norm1.bias):
        tensor.data[1] = tensor.data[0]
    first, second = slimming.trace(model, images[:1]).scores("reconstruction", batches=[images])[:2].sort().values
    assert first < 0.05 * second


class Mixed(nn.Module):
    """A stream that three convolutions write and four read, a grouped and a depthwise convolution, a concatenation."""

    def __init__(self):
        super().__init__()
        self.stem = self._conv(3, 8)
        self.branch1, self.branch2 = nn.Sequential(self._conv(8, 6), self._conv(6, 8)), self._conv(8, 8, groups=2)
        self.depthwise, self.side = nn.Sequential(self._conv(8, 12, 1), self._conv(12, 12, groups=12)), self._conv(8, 4)
        self.end = self._conv(16, 10, 1)
        self.head = nn.Linear(10, 3)

    def _conv(self, c_in, c_out, kernel=3, groups=1):
        conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, groups=groups, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU())

    def forward(self, x):
        x = self.stem(x)
        x = x + self.branch1(x)
        x = x + self.branch2(x)
        return self.head(self.end(torch.cat((self.depthwise(x), self.side(x)), 1)).mean((2, 3)))


NETS = {
    "vgg11": lambda: models.vgg(11, width=0.125),
    "preresnet20": lambda: models.preresnet(20, width=0.5),
    "densenet13": lambda: models.densenet(13, growth=4),
    "mixed": Mixed,
}


@pytest.mark.parametrize("name", NETS)
def test_every_channel_that_may_go_has_a_score(name):
    torch.manual_seed(0)
    images = torch.randn(24, 3, 32, 32)
    model = slimming.calibrate(NETS[name](), [images])
    graph = slimming.trace(model, images[:1])
    batches = [(part, torch.arange(12) % 3) for part in images.split(12)]  # labels may be there
    for score in ("lamp", "reconstruction"):
        values = graph.scores(score, batches=batches)
        assert bool((values[graph.candidates("together")] >= 0).all())
        again = graph.scores(score, batches=images.split(12))
        assert torch.equal(values.nan_to_num(), again.nan_to_num())
    for ties in ("together", "apart"):
        given = {n: values[norm.all] for n, norm in graph.norms.items()}
        plan = graph.plan(slimming.GlobalRatio(0.4), score=given, ties=ties)
        assert 0.25 < plan.got["ratio"] < 0.75
        slimming.prune(model, plan)


def test_tied_channels_cost_what_all_their_readers_lose():
    torch.manual_seed(0)
    images = torch.randn(24, 3, 8, 8)
    model = slimming.calibrate(Mixed(), [images])
    graph = slimming.trace(model, images[:1])
    scores = graph.scores("reconstruction", batches=[images])
    of = {name: scores[norm.all] for name, norm in graph.norms.items()}
    assert torch.equal(of["stem.1"], of["branch1.1.1"]) and torch.equal(of["stem.1"][:4], of["branch2.1"][:4])
    assert torch.equal(of["stem.1"][:4], of["stem.1"][4:])  # the two groups read them as one
    assert torch.equal(of["depthwise.0.1"], of["depthwise.1.1"])  # the depthwise convolution reads nothing by itself


def test_few_at_once_are_nearly_one_at_a_time(images, monkeypatch):
    torch.manual_seed(0)
    model = settled(Chain(width=24), images)
    graph = slimming.trace(model, images[:1])
    one = graph.scores("reconstruction", batches=[images])
    monkeypatch.setattr(module, "STEPS", 8)
    several = graph.scores("reconstruction", batches=[images])
    assert not torch.equal(one, several)
    assert len({*one[:24].argsort()[:12].tolist()} & {*several[:24].argsort()[:12].tolist()}) >= 10


# --- per MAC ----------------------------------------------------------------------------------------------------------


def test_scores_per_mac_by_hand(chain, images):
    """conv1 3 -> 5 at 8x8, conv2 5 -> 4 at 8x8, the head reads 4 channels at 4 positions and writes 3."""
    first, second = 64 * 9 * 3 + 64 * 9 * 4, 64 * 9 * 5 + 4 * 3
    graph = slimming.trace(chain, images[:1])
    given = {"norm1": [0.99 * first, 9e9, 9e9, 9e9, 1.01 * first], "norm2": [9e9, 9e9, 9e9, second]}
    plan = graph.plan(slimming.GlobalRatio(0.12), score=given, per="macs")
    assert plan.keep == {"norm1": [1, 2, 3, 4]} and plan.asked["per"] == "macs"
    plan = graph.plan(slimming.GlobalRatio(0.23), score=given, per="macs")
    assert plan.keep == {"norm1": [1, 2, 3, 4], "norm2": [0, 1, 2]} and plan.got["highest_score"] == pytest.approx(1)
    assert graph.plan(slimming.GlobalRatio(0.12), score=given).keep == {"norm2": [0, 1, 2]}  # it scores less


def test_the_macs_of_a_unit_are_what_its_removal_saves():
    graph = slimming.trace(Mixed(), torch.randn(1, 3, 8, 8))
    free, classes = decided_together(graph, trainable_gammas(graph))
    choice = make_choice(graph, free, classes, torch.zeros(graph.count, dtype=torch.float64), "max")
    stream = set(range(graph.norms["stem.1"].start, graph.norms["stem.1"].module.num_features))
    for unit, macs in enumerate(unit_macs(graph, choice).tolist()):
        gone = choice.gammas[choice.unit == unit]
        kept = torch.ones(graph.count, dtype=torch.bool).index_fill(0, gone, False)
        left = graph.cost_share(solve(graph, kept, torch.zeros(graph.tape.count, dtype=torch.bool)))["macs"]
        saved = (1 - left) * graph.dense_cost["macs"]
        if stream & {*gone.tolist()}:  # one layer reads and writes it: its corner is counted twice
            assert saved < macs < 1.2 * saved
        else:
            assert macs == pytest.approx(saved)


# --- given ones, and what does not fit ------------------------------------------------------------------------------


def test_given_scores_decide(chain, images):
    graph = slimming.trace(chain, images[:1])
    given = {"norm1": torch.arange(5.0), "norm2": [9.0, 0.5, 9.0, 9.0]}
    plan = graph.plan(slimming.GlobalRatio(0.34), score=given)
    assert plan.keep == {"norm1": [2, 3, 4], "norm2": [0, 2, 3]} and plan.asked["score"] == "given"
    with pytest.raises(GraphError, match=r"norm2 has channels without a finite score: .*ignore=\['norm2'\]"):
        graph.plan(slimming.GlobalRatio(0.3), score={"norm1": torch.ones(5)})
    plan = graph.plan(slimming.GlobalRatio(0.4), score={"norm1": torch.arange(5.0)}, ignore=["norm2"])
    assert plan.keep == {"norm1": [2, 3, 4]}


@pytest.mark.parametrize(
    ("score", "error", "words"),
    [
        ("reconstruction", GraphError, "score=reconstruction needs data"),
        ("typo", ConfigError, "score must be one of"),
        ({"norm3": [1.0]}, ConfigError, "score: 'norm3' is no BatchNorm with scales; there are norm1, norm2"),
        ({"norm1": [1.0]}, ConfigError, r"score: norm1 needs 5 numbers, got \[1\]"),
    ],
)
def test_scores_that_do_not_fit(chain, images, score, error, words):
    with pytest.raises(error, match=words):
        slimming.trace(chain, images[:1]).plan(slimming.GlobalRatio(0.5), score=score)


def test_a_layer_that_is_too_large_is_named(chain, images, monkeypatch):
    monkeypatch.setattr(module, "LARGEST", 20)
    with pytest.raises(GraphError, match="score=reconstruction: conv2 has 45 inputs to one output, more than 20"):
        slimming.trace(chain, images[:1]).scores("reconstruction", batches=[images])
