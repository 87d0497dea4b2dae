"""A stage for sabotage: networks, the scene that a saboteur gets, and a judge that knows nothing of the proof.

A saboteur (`saboteurs.py`) breaks one of four things: the thin network's tensors and attributes (`network`), the plan from
which it is made (`plan`), the code of the surgery (`code`), or the masked network that the proof compares with (`mask`). It
raises `NotHere` where the network has no such layer.
"""

import copy
import dataclasses
import functools
import random
from collections.abc import Callable
from contextlib import nullcontext
from unittest import mock

import numpy as np
import torch
from torch import nn
from torchvision import models as zoo

import slimming
from slimming import models
from slimming.channels import proof, surgery
from slimming.channels.plan import LayerPlan, PruningPlan
from slimming.errors import PlanError

NORM = nn.modules.batchnorm._BatchNorm
CLEAR, ROUNDING = 1e-8, 1e-12  # relative: what the proof (1e-9 in float64) must refuse, and what it must let pass
SABOTEURS: dict[str, tuple[str, Callable]] = {}


class NotHere(Exception):
    """The network has no layer that this saboteur could break."""


# --- networks ---------------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """What the others lack: a transposed convolution, a layer used twice, biases before BatchNorms, a flattened tensor."""

    def __init__(self):
        super().__init__()
        self.one, self.n1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.up, self.n2 = nn.ConvTranspose2d(8, 12, 2, stride=2), nn.BatchNorm2d(12)
        self.twice, self.n3 = nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.grouped, self.n4 = nn.Conv2d(12, 16, 3, stride=4, groups=4), nn.BatchNorm2d(16)
        self.fc, self.n5, self.head = nn.Linear(16 * 4 * 4, 24), nn.BatchNorm1d(24), nn.Linear(24, 10)

    def forward(self, x):
        x = torch.tanh(self.n2(self.up(torch.tanh(self.n1(self.one(x))))))
        x = self.twice(torch.tanh(self.twice(x)))
        x = torch.tanh(self.n4(self.grouped(torch.tanh(self.n3(x)))))
        return self.head(torch.tanh(self.n5(self.fc(x.flatten(1)))))


def resnext(**options) -> nn.Module:
    return zoo.ResNet(zoo.resnet.Bottleneck, [1, 1, 1, 1], groups=8, width_per_group=8, num_classes=10, **options)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "vgg11": (lambda: models.build("vgg", depth=11, width=0.25), 16),
    "preresnet20": (lambda: models.build("preresnet", depth=20), 16),
    "densenet22": (lambda: models.build("densenet", depth=22, growth=6), 16),
    "mobilenet_v2": (lambda: zoo.mobilenet_v2(width_mult=0.5, num_classes=10), 48),
    "shufflenet_v2": (lambda: zoo.shufflenet_v2_x0_5(num_classes=10), 48),
    "resnext": (resnext, 48),
    "regnet_y": (lambda: zoo.regnet_y_400mf(num_classes=10), 48),
    "mobilenet_v3": (lambda: zoo.mobilenet_v3_small(num_classes=10), 48),
    "efficientnet": (lambda: zoo.efficientnet_b0(num_classes=10), 48),
    "odd": (Odd, 9),
}
TIES = ("together", "apart", "aligned")
# What writes a tensor without a BatchNorm, of which layers without a BatchNorm read channels that may go aligned.
WITHOUT_A_NORM = {
    "preresnet20": ["conv1", *(f"layer{i}.{j}.conv3" for i in (1, 2) for j in (0, 1))],
    "odd": ["twice"],
}
WITHOUT_A_NORM["preresnet20"] += ["layer1.0.downsample.0", "layer2.0.downsample.0"]


@dataclasses.dataclass
class Scene:
    """A network, its plan, a thin network to break, and a seeded choice of where."""

    name: str
    ties: str
    model: nn.Module
    plan: PruningPlan
    thin: nn.Module
    pick: random.Random

    def layers(self, *kinds: str, where: Callable[[LayerPlan], bool] = lambda layer: True) -> list[str]:
        return [n for n, p in self.plan.layers.items() if p.kind in kinds and where(p)]

    def layer(self, *kinds: str, where: Callable[[LayerPlan], bool] = lambda layer: True) -> str:
        return self.choose(self.layers(*kinds, where=where))

    def module(self, *kinds: str, where: Callable[[nn.Module], bool] = lambda module: True) -> nn.Module:
        """Choose a module of the thin network that the plan changes."""
        return self.choose([m for n in self.layers(*kinds) if where(m := self.thin.get_submodule(n))])

    def choose(self, found: list):
        if not found:
            raise NotHere
        return self.pick.choice(found)

    def two(self, count: int) -> list[int]:
        if count < 2:
            raise NotHere
        return self.pick.sample(range(count), 2)


@functools.lru_cache(maxsize=4)
def prepared(name: str, ties: str) -> tuple[nn.Module, PruningPlan, nn.Module]:
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    model = randomise(make()).eval()
    plan = slimming.trace(model, torch.zeros(1, 3, size, size, dtype=torch.float64)).plan(
        slimming.GlobalRatio(0.4), ties=ties
    )
    return model, plan, slimming.prune(model, plan)


def scene(name: str, ties: str, saboteur: str) -> Scene:
    model, plan, thin = prepared(name, ties)
    pick = random.Random(f"{name} {ties} {saboteur}")
    return Scene(name, ties, model, copy.deepcopy(plan), copy.deepcopy(thin), pick)


def randomise(model: nn.Module) -> nn.Module:
    """Draw gammas, betas and running statistics in float64, as a trained network has them: no two alike."""
    generator = torch.Generator().manual_seed(0)
    for norm in (m for m in model.double().modules() if isinstance(m, NORM)):
        for key in ("weight", "bias", "running_mean", "running_var"):
            draw = torch.randn(norm.num_features, generator=generator, dtype=torch.float64)
            getattr(norm, key).data.copy_(draw.abs() + 0.5 if key == "running_var" else draw)
    return model


# --- the independent judge --------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def wanted(name: str, ties: str) -> tuple[list[torch.Tensor], list[np.ndarray]]:
    """Return random images and what the masked network makes of them; masked here, one channel after the other."""
    model, plan, _ = prepared(name, ties)
    dense = copy.deepcopy(model).eval()
    for layer, kept in plan.keep.items():
        norm = dense.get_submodule(layer)
        for channel in set(range(norm.num_features)) - set(kept):
            norm.weight.data[channel], norm.bias.data[channel] = 0, 0
    for layer in WITHOUT_A_NORM.get(name, ()) if ties == "aligned" else ():
        module, kept = dense.get_submodule(layer), plan.layers[layer].outs
        for channel in set(range(module.out_channels)) - set(kept):
            module.weight.data[channel] = 0
            if module.bias is not None:
                module.bias.data[channel] = 0
    rng = np.random.default_rng(123)
    shape = (6, *plan.spec["shape"][1:])
    images = [torch.from_numpy(scale * rng.standard_normal(shape)) for scale in (1.0, 3.0, 10.0)]
    with torch.no_grad():
        return images, [dense(x).numpy() for x in images]


def change(here: Scene, thin: nn.Module | None) -> float:
    """Return by how much a network differs from the masked one; inf where it does not run or gives other shapes."""
    if thin is None:
        return float("inf")
    largest = 0.0
    for images, expected in zip(*wanted(here.name, here.ties), strict=True):
        try:
            with torch.no_grad():
                given = thin.eval()(images).numpy()
        except Exception:
            return float("inf")
        if given.shape != expected.shape or not np.isfinite(given).all():
            return float("inf")
        largest = max(largest, np.abs(given - expected).max() / np.abs(expected).max())
    return largest


@dataclasses.dataclass
class Verdict:
    """What came of one sabotage: `changed` as the judge measured it, `caught` by the proof, with its words."""

    saboteur: str
    network: str
    ties: str
    changed: float
    caught: bool
    how: str

    @property
    def verdict(self) -> str:
        """Return caught, missed, dormant (caught, though none of the judge's images shows it), rounding or no change."""
        if self.changed > CLEAR:
            return "caught" if self.caught else "missed"
        if self.caught:
            return "dormant"
        return "within rounding" if self.changed > ROUNDING else "no change"


def attempt(saboteur: str, network: str, ties: str) -> Verdict | None:
    """Sabotage one network and ask the proof; None where there is nothing to sabotage."""
    kind, strike = SABOTEURS[saboteur]
    here = scene(network, ties, saboteur)
    try:
        patches = strike(here) or {}
    except NotHere:
        return None
    broken, how = (here.thin if kind == "network" else None), ""
    broken_code = proof if kind == "mask" else surgery
    with mock.patch.multiple(broken_code, **patches) if patches else nullcontext():
        judged = proof.mask(here.model, here.plan) if kind == "mask" else None
        try:
            broken = broken or surgery.prune(here.model, here.plan, verify=False)
            proof.prove(here.model, broken, here.plan)
        except Exception as error:
            how = str(error) if isinstance(error, PlanError) else f"{type(error).__name__}: {error}"
    return Verdict(saboteur, network, ties, change(here, judged or broken), bool(how), how)


def register(kind: str) -> Callable:
    """Return a decorator that lists a saboteur under its name in words."""

    def listed(strike):
        SABOTEURS[strike.__name__.replace("_", " ")] = (kind, strike)
        return strike

    return listed


network, plan, code, mask = map(register, ("network", "plan", "code", "mask"))
