"""The penalties beside the paper's: gradients against autograd, steps against closed forms, groups against lists by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from residual import Residual
from slimming import models
from slimming.channels.options import PENALTY_NAMES
from slimming.channels.penalties import PENALTIES, Grouped, Polarization, Proximal, make_penalty
from slimming.channels.penalty import Penalty
from slimming.errors import ConfigError, GraphError

GROUPS = torch.tensor([0, 1, 1, 2, 0, 3, 0, 4])  # of the gammas below; group 4 is the zero alone


@pytest.fixture
def gammas():
    torch.manual_seed(0)
    values = [torch.randn(5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)]
    values[1][2] = 0.0
    return {str(i): nn.Parameter(v) for i, v in enumerate(values)}


def polarization(gammas, t):
    flat = torch.cat([*gammas.values()])
    return t * flat.abs().sum() - (flat - flat.mean()).abs().sum()


def group(gammas):
    flat = torch.cat([*gammas.values()])
    members = ([0, 4, 6], [1, 2], [3], [5])
    return sum(len(m) ** 0.5 * flat[m].square().sum().sqrt() for m in members)  # that of zeros alone has no derivative


CASES = [
    (lambda g: Penalty(g, 0.3), lambda g: sum(x.abs().sum() for x in g.values())),
    (lambda g: Polarization(g, 0.3), lambda g: polarization(g, 1.0)),
    (lambda g: Polarization(g, 0.3, -0.5), lambda g: polarization(g, -0.5)),
    (lambda g: Grouped(g, 0.3, GROUPS), group),
]


@pytest.mark.parametrize("factor", [1.0, 0.25, torch.tensor(4.0)], ids=str)
@pytest.mark.parametrize(("make", "formula"), CASES, ids=["l1", "polarization", "t=-0.5", "group"])
def test_gradients_and_values_are_those_of_the_formula(make, formula, factor, gammas):
    penalty = make(gammas)
    value = 0.3 * formula(gammas)
    expected = torch.autograd.grad(value * factor, list(gammas.values()))
    gammas["0"].grad = torch.ones_like(gammas["0"])  # is added to; the other's is missing
    penalty.add_gradient(factor)
    torch.testing.assert_close(gammas["0"].grad - 1, expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gammas["1"].grad, expected[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(penalty.value(), value.detach(), rtol=1e-12, atol=1e-12)


def step(penalty, optimizer, gradient=0.0):
    optimizer.zero_grad()
    for gamma in penalty.gammas.values():
        gamma.grad = torch.full_like(gamma, gradient)
    penalty.add_gradient()
    optimizer.step()


def test_proximal_is_the_soft_threshold_and_zeros_are_exact(gammas):
    penalty = Proximal(gammas, 0.3)
    slow, fast = gammas["1"], gammas["0"]
    optimizer = torch.optim.SGD([{"params": [slow], "lr": 0.5}, {"params": [fast], "lr": 2.0}])
    before = {k: g.detach().clone() for k, g in gammas.items()}
    penalty.follow(optimizer)
    step(penalty, optimizer, 0.125)
    for gamma, key, lr in ((slow, "1", 0.5), (fast, "0", 2.0)):  # each by the rate of its own group
        torch.testing.assert_close(gamma.detach(), F.softshrink(before[key] - lr * 0.125, lr * 0.3), rtol=0, atol=1e-15)
    optimizer.param_groups[1]["lr"] = 100.0  # the rate of the moment
    step(penalty, optimizer)
    assert not fast.any() and slow.any()
    penalty.sparsity = 1e3  # the lambda of the moment
    step(penalty, optimizer)
    assert not slow.any()


def test_proximal_alone_moves_a_gamma_by_its_maximum_shrinkage():
    gamma = nn.Parameter(torch.tensor([100.0, -50.0], dtype=torch.float64))
    penalty, optimizer = Proximal({"": gamma}, 0.01), torch.optim.SGD([gamma], lr=0.1, momentum=0.9)
    penalty.follow(optimizer)
    for _ in range(200):
        step(penalty, optimizer)
    assert penalty.reach(0.1 * 200, 0.9) == penalty.reach(0.1 * 200, None) == pytest.approx(20)
    assert gamma.tolist() == pytest.approx([99.8, -49.8])


@pytest.mark.parametrize("t", [-0.5, 1.0, 2.0])
def test_no_gamma_moves_farther_than_polarization_says(t):
    values = torch.cat((torch.rand(50), torch.ones(950))).double()  # most lie above the mean: the strongest pull
    gamma = nn.Parameter(values.clone())
    penalty = Polarization({"": gamma}, 1e-5, t)
    optimizer = torch.optim.SGD([gamma], lr=0.1)
    for _ in range(20):
        step(penalty, optimizer)
    bound = 1e-5 * penalty.reach(0.1 * 20, 0.0)
    assert 0.9 * bound < float((values - gamma.detach()).max()) <= bound
    assert penalty.reach(2.0, None) is None


def test_polarization_clamps_and_splits_the_gammas_as_its_minimum_says():
    gamma, other = nn.Parameter(torch.linspace(-0.5, 1.5, 100)), nn.Parameter(torch.linspace(0, 1, 100))
    free = nn.Parameter(torch.tensor([5.0]))  # not penalised
    penalty = Polarization({"a": gamma, "b": other}, 0.01, t=0.0)
    optimizer = torch.optim.SGD([gamma, other, free], lr=0.1)
    assert "25 lie outside" not in penalty.describe() and "50 lie outside now" in penalty.describe()
    handle = penalty.follow(optimizer)
    step(penalty, optimizer)
    assert bool(((gamma >= 0) & (gamma <= 1)).all()) and free.item() == 5
    for _ in range(1500):
        step(penalty, optimizer)
    flat = torch.cat((gamma, other))
    assert set(flat.tolist()) == {0.0, 1.0}
    assert float((flat == 0).float().mean()) == pytest.approx((0 + 2) / 4, abs=0.05)
    handle.remove()
    with torch.no_grad():
        gamma[0] = 3.0
    step(penalty, optimizer)
    assert gamma[0] > 1


def test_the_root_mean_square_of_a_group_moves_by_its_maximum_shrinkage():
    gamma = nn.Parameter(torch.tensor([3.0, 4.0, 12.0], dtype=torch.float64))
    penalty = Grouped({"": gamma}, 0.01, torch.zeros(3, dtype=torch.long))
    optimizer = torch.optim.SGD([gamma], lr=0.1)
    before = float(gamma.detach().square().mean().sqrt())
    for _ in range(100):
        step(penalty, optimizer)
    moved = before - float(gamma.detach().square().mean().sqrt())
    assert moved == pytest.approx(0.01 * penalty.reach(0.1 * 100, 0.0), rel=1e-9) == pytest.approx(0.1)


@pytest.mark.parametrize("name", PENALTY_NAMES)
def test_without_sparsity_nothing_moves(name):
    model = Residual()
    with torch.no_grad():
        model.bn1.weight[:2] = torch.tensor([-1.0, 3.0])  # outside [0, 1]
    penalty = make_penalty(model, 0.0, name=name, example=torch.zeros(1, 3, 8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penalty.follow(optimizer)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    penalty.add_gradient()
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert float(penalty.value()) == 0


@pytest.mark.parametrize("fused", [False, True])  # a fused optimizer is called in any case, and looks itself
@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("name", ["proximal", "polarization"])
def test_a_step_that_a_scaler_skips_moves_nothing(fused, finite, name):
    gamma = nn.Parameter(torch.tensor([2.0, -1.0, 0.5]))
    penalty, optimizer = PENALTIES[name]({"": gamma}, 0.5), torch.optim.SGD([gamma], lr=0.1, fused=fused)
    penalty.follow(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale((gamma * (0.0 if finite else float("inf"))).sum()).backward()
    penalty.add_gradient(scaler.scale(torch.ones(())))
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(gamma.detach(), torch.tensor([2.0, -1.0, 0.5])) != finite


def groups_by_name(model, example, **options):
    """Return the groups of several gammas as sets of `layer:index`, and how many gammas are alone."""
    penalty = make_penalty(model, 1e-4, name="group", example=example, **options)
    names = [f"{name}:{i}" for name, gamma in penalty.gammas.items() for i in range(len(gamma))]
    found = {}
    for name, number in zip(names, penalty.groups.tolist(), strict=True):
        found.setdefault(number, set()).add(name)
    several = [g for g in found.values() if len(g) > 1]
    return several, len(found) - len(several)


def expected(width, *layers):
    return [{f"{layer}:{i}" for layer in layers} for i in range(width)]


def same(found, wanted):
    assert sorted(map(sorted, found)) == sorted(map(sorted, wanted))


def test_the_gammas_that_write_into_a_residual_stream_are_a_group():
    found, alone = groups_by_name(Residual(), torch.zeros(1, 3, 8, 8))
    same(found, expected(8, "bn1", "bn2"))
    assert alone == 0


def test_the_groups_of_a_resnet_are_its_stages():
    model = models.torchvision("resnet18", weights=None, num_classes=10, in_channels=3)
    found, alone = groups_by_name(model, torch.zeros(1, 3, 32, 32))
    stem = expected(64, "bn1", "layer1.0.bn2", "layer1.1.bn2")
    later = [(128, 2), (256, 3), (512, 4)]
    stages = [
        g for w, n in later for g in expected(w, f"layer{n}.0.bn2", f"layer{n}.0.downsample.1", f"layer{n}.1.bn2")
    ]
    same(found, stem + stages)
    assert alone == 2 * (64 + 128 + 256 + 512)


def test_the_gammas_that_read_a_pre_activation_stream_are_a_group():
    model = models.preresnet(11, width=0.25)  # one bottleneck block in each stage, behind a convolution
    penalised = {n: m.num_features for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    found, alone = groups_by_name(model, torch.zeros(1, 3, 32, 32))
    assert not found and alone == sum(penalised.values())  # every stream has one reader
    model = models.preresnet(20, width=0.25)  # two blocks in each stage
    found, _ = groups_by_name(model, torch.zeros(1, 3, 32, 32))
    readers = [("layer1.1.bn1", "layer2.0.bn1"), ("layer2.1.bn1", "layer3.0.bn1"), ("layer3.1.bn1", "bn")]
    width = {name: m.num_features for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    same(found, [g for pair in readers for g in expected(width[pair[0]], *pair)])


def test_layers_restrict_the_groups():
    found, alone = groups_by_name(Residual(), torch.zeros(1, 3, 8, 8), layers=["bn2"])
    assert not found and alone == 8


def test_gammas_that_the_example_does_not_reach_are_alone():
    model = Residual()
    model.unused = nn.BatchNorm2d(3)
    found, alone = groups_by_name(model, torch.zeros(1, 3, 8, 8))
    same(found, expected(8, "bn1", "bn2"))
    assert alone == 3


def test_a_stream_that_cannot_go_makes_no_group():
    class Out(Residual):
        def forward(self, x):
            x = self.bn1(self.conv1(x)).relu()
            return x + self.bn2(self.conv2(x))  # the network's output

    found, alone = groups_by_name(Out(), torch.zeros(1, 3, 8, 8))
    assert not found and alone == 16


def test_a_group_vanishes_whole():
    """Where the loss holds one gamma of a stream a little, L1 removes the others one by one and group all or none."""
    gamma = nn.Parameter(torch.full((6,), 0.5))
    pull = torch.tensor([0.8, 0.0, 0.0, 3.0, 0.0, 0.0])  # the loss's hold on each; two groups of three
    left = {}
    for penalty in (Penalty({"": gamma}, 1.0), Grouped({"": gamma}, 1.0, torch.tensor([0, 0, 0, 1, 1, 1]))):
        with torch.no_grad():
            gamma.fill_(0.5)
        optimizer = torch.optim.SGD([gamma], lr=3e-3)
        for _ in range(1000):
            optimizer.zero_grad()
            (pull * (gamma - 0.5).abs()).sum().backward()
            penalty.add_gradient()
            optimizer.step()
        left[type(penalty)] = gamma.detach().abs() > 0.02
    assert left[Penalty].tolist() == [False, False, False, True, False, False]
    assert left[Grouped].tolist()[:3] == [False, False, False] and left[Grouped][3]


def test_the_table_names_all_that_the_option_allows():
    assert tuple(PENALTIES) == PENALTY_NAMES


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"name": "l2"}, ConfigError, "penalty.name must be one of l1, proximal, polarization, group; got 'l2'"),
        ({"name": "polarization", "t": 2.5}, ConfigError, "penalty.t must be a number >= -2 and <= 2, got 2.5"),
        ({"name": "polarization", "t": "high"}, ConfigError, "penalty.t must be a number"),
        ({"t": 1.0}, ConfigError, "penalty.t=1 is of penalty=polarization, and this is penalty=l1"),
        ({"layers": "bn1"}, ConfigError, "penalty.layers must be a list of shell patterns"),
        ({"layers": ["nowhere"]}, ConfigError, "penalty.layers: 'nowhere' matches no BatchNorm"),
        ({"name": "group"}, ConfigError, "penalty=group needs an example input"),
        ({"name": "group", "example": torch.zeros(1, 5, 8, 8)}, GraphError, "fails on the example input"),
    ],
    ids=str,
)
def test_bad_values_are_named(options, error, words):
    with pytest.raises(error, match=words):
        make_penalty(Residual(), 1e-4, **options)


@pytest.mark.parametrize("name", PENALTY_NAMES)
def test_a_network_without_batchnorm_has_no_gammas_and_no_penalty(name):
    penalty = make_penalty(nn.Conv2d(3, 3, 1), 1e-4, name=name, example=torch.zeros(1, 3, 8, 8))
    penalty.add_gradient()
    assert not penalty.gammas and float(penalty.value()) == 0 and len(penalty.flat()) == 0
