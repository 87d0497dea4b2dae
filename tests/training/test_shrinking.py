"""A shrink changes nothing but the width: the thin network trains on as the masked one would."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import slimming
from slimming import checkpoint, models
from slimming.channels.penalties import make_penalty
from slimming.channels.penalty import batchnorm_gammas, near_zero_share
from slimming.channels.plan import PruningPlan
from slimming.channels.surgery import axes_of, tensors_of
from slimming.stages.restoring import at_full_width
from slimming.training.module import parameter_groups
from slimming.training.shrinking import Leaving, Shrinking, shrinks, staying

NETWORKS = {
    "plain": lambda: models.build("vgg", depth=11, widths=[8, "M", 12], num_classes=5, in_channels=3),
    "residual": lambda: models.build("preresnet", depth=11, width=0.5, num_classes=5, in_channels=3),
    "dense": lambda: models.build("densenet", depth=10, growth=4, num_classes=5, in_channels=3),
}
OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
}
EXAMPLE = torch.zeros(1, 3, 8, 8, dtype=torch.float64)


def groups_of(model: nn.Module) -> list[dict]:
    parameters = dict(model.named_parameters())
    return [{"params": [parameters[n] for n in names]} for _, names in parameter_groups(model, decay_batchnorm=False)]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, penalty, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(16, 3, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (16,), generator=generator)
    optimizer.zero_grad()
    loss = F.cross_entropy(model.train()(images), labels)
    loss.backward()
    penalty.add_gradient()
    optimizer.step()
    return loss.item()


def trained(network: str, optimizer: str, name: str = "l1") -> tuple[nn.Module, torch.optim.Optimizer, torch.Tensor]:
    """Train a little; return (network, optimizer, epochs for which each gamma has been low): every third, for two."""
    torch.manual_seed(3)
    model = NETWORKS[network]().double()
    opt = OPTIMIZERS[optimizer](groups_of(model))
    penalty = make_penalty(model, 1e-3, name=name, example=EXAMPLE)
    for seed in range(3):
        step(model, opt, penalty, seed)
    count = sum(map(len, batchnorm_gammas(model).values()))
    low = (torch.arange(count) % 3 == 0).long() * 2
    for gamma, part in zip(
        batchnorm_gammas(model).values(), low.split([len(g) for g in batchnorm_gammas(model).values()]), strict=True
    ):
        gamma.data[part > 0] *= 1e-4
    return model, opt, low


def written(path, model: nn.Module, opt: torch.optim.Optimizer, low: torch.Tensor) -> None:
    """Write what a training's last.ckpt holds of these."""
    state = {"low": low, "tried": low > 9, "due": True}
    record = {"format": 1, "model": None, "plans": [], "metrics": {}}
    content = {
        "state_dict": {checkpoint.PREFIX + k: v for k, v in model.state_dict().items()},
        "optimizer_states": [opt.state_dict()],
        "callbacks": {"Shrinking": state, "Recorder": {"history": [1]}},
        "slimming": record,
        "epoch": 4,
    }
    checkpoint.write(content, path)


def leaving(epochs: int = 2) -> Leaving:
    return Leaving(EXAMPLE, None, decay_batchnorm=False, threshold=0.01, epochs=epochs)


def sliced(wide: nn.Module, plan: PruningPlan) -> dict[str, torch.Tensor]:
    """Slice the tensors of a wide network as a plan says."""
    found, modules = dict(wide.state_dict()), dict(wide.named_modules())
    for name, layer in plan.layers.items():
        for attribute, tensor in tensors_of(wide, modules, name):
            for axis, indices in axes_of(layer, tensor):
                key = f"{name}.{attribute}"
                found[key] = found[key].index_select(axis, torch.tensor(indices))
    return found


@pytest.mark.parametrize("penalty", ["l1", "polarization", "group"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_training_goes_on_as_that_of_the_masked_network(network, optimizer, penalty, tmp_path):
    model, opt, low = trained(network, optimizer, penalty)
    written(tmp_path / "last.ckpt", model, opt, low)
    plan = leaving().let_go(tmp_path / "last.ckpt", copy.deepcopy(model))
    assert plan is not None and plan.got["removed"] > 0
    saved = checkpoint.read(tmp_path / "last.ckpt")
    thin = checkpoint.rebuild(saved, model)
    thin_opt = OPTIMIZERS[optimizer](groups_of(thin))
    thin_opt.load_state_dict(saved.content["optimizer_states"][0])
    masked = slimming.mask(model, plan)
    masked_opt = OPTIMIZERS[optimizer](groups_of(masked))
    masked_opt.load_state_dict(opt.state_dict())
    mine, its = (make_penalty(m, 1e-3, name=penalty, example=EXAMPLE) for m in (thin, masked))
    mine.narrow(its, staying(batchnorm_gammas(model), plan))
    torch.testing.assert_close(mine.value(), its.value())
    assert near_zero_share(mine.flat()) == near_zero_share(its.flat())
    for seed in (7, 8, 9):
        assert step(thin, thin_opt, mine, seed) == pytest.approx(step(masked, masked_opt, its, seed), rel=1e-9)
        masked.load_state_dict(slimming.mask(masked, plan).state_dict())
        torch.testing.assert_close(dict(thin.state_dict()), sliced(masked, plan), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("network", NETWORKS)
def test_at_full_width_nothing_is_computed_otherwise(network, tmp_path):
    model, opt, low = trained(network, "sgd")
    path, first = tmp_path / "last.ckpt", copy.deepcopy(model)
    written(path, model, opt, low)
    leaving().let_go(path, model)
    for again in range(2):  # a second and a third shrink: of what is left
        saved = checkpoint.read(path)
        thin = checkpoint.rebuild(saved, first)
        count = sum(map(len, batchnorm_gammas(thin).values()))
        written(path, thin, OPTIMIZERS["sgd"](groups_of(thin)), (torch.arange(count) % 4 == again).long() * 2)
        content = checkpoint.read(path).content
        content["slimming"]["plans"] = saved.record.plans
        checkpoint.write(content, path)
        leaving().let_go(path, thin)
    saved = checkpoint.read(path)
    thin = checkpoint.rebuild(saved, first)
    assert len(shrinks(saved.record.plans)) == 3
    wide = at_full_width(copy.deepcopy(first), thin, saved.record.plans)
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(wide(images), thin(images), rtol=1e-9, atol=1e-9)
    assert {k: v.shape for k, v in wide.state_dict().items()} == {k: v.shape for k, v in first.state_dict().items()}


def test_what_cannot_leave_stays_and_is_tried_once(tmp_path):
    """Of the plain network's layers, each keeps a channel, even where all have been low."""
    model, opt, low = trained("plain", "sgd")
    path = tmp_path / "last.ckpt"
    written(path, model, opt, torch.full_like(low, 5))
    plan = leaving().let_go(path, copy.deepcopy(model))
    state = checkpoint.read(path).content["callbacks"]
    assert [len(kept) for kept in plan.keep.values()] == [1, 1]
    assert state["Shrinking"]["low"].tolist() == [5, 5] and state["Shrinking"]["tried"].tolist() == [True, True]
    assert state["Shrinking"]["due"] is False and state["Recorder"] == {"history": [1]}
    thin = checkpoint.rebuild(checkpoint.read(path), model)
    before = checkpoint.read(path).content["state_dict"]
    assert leaving().let_go(path, thin) is None  # nothing to shrink is fine
    after = checkpoint.read(path)
    assert len(after.record.plans) == 1 and all(
        torch.equal(before[k], v) for k, v in after.content["state_dict"].items()
    )


def test_kept_widths_are_rounded_up(tmp_path):
    model, opt, low = trained("plain", "sgd")
    written(tmp_path / "last.ckpt", model, opt, low)  # every third: 3 of 8 and 4 of 12
    left = leaving()
    left.round_to = 4
    plan = left.let_go(tmp_path / "last.ckpt", model)
    assert [len(kept) for kept in plan.keep.values()] == [8]
    tried = checkpoint.read(tmp_path / "last.ckpt").content["callbacks"]["Shrinking"]["tried"]
    assert int(tried[:8].sum()) == 3 and not tried[8:].any()  # those of the first layer wait for another one


def test_a_network_that_would_differ_is_not_written(tmp_path, monkeypatch):
    from slimming.channels import proof
    from slimming.errors import PlanError

    model, opt, low = trained("plain", "sgd")
    written(tmp_path / "last.ckpt", model, opt, low)
    before = (tmp_path / "last.ckpt").read_bytes()
    monkeypatch.setattr(proof, "relative_difference", lambda a, b: 0.5)
    with pytest.raises(PlanError, match="differs from the masked one"):
        leaving().let_go(tmp_path / "last.ckpt", model)
    assert (tmp_path / "last.ckpt").read_bytes() == before


class Trainer:
    """As much of a Trainer as the callback asks for."""

    def __init__(self, epochs: int = 10) -> None:
        self.should_stop, self.current_epoch, self.max_epochs = False, 0, epochs
        self.strategy = self

    def broadcast(self, value):
        return value


class Module(nn.Module):
    def __init__(self, gammas: list[float]) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(len(gammas))
        self.norm.weight.data = torch.tensor(gammas)
        self.penalty = make_penalty(self.norm, 1.0)
        self.penalty.removed = 7

    def log(self, name, value, sync_dist):
        assert name == "gammas_left" and value == len(self.norm.weight)


def epoch(callback: Shrinking, trainer: Trainer, module: Module, gammas: list[float]) -> bool:
    module.norm.weight.data = torch.tensor(gammas)
    callback.on_train_epoch_end(trainer, module)
    trainer.current_epoch += 1
    return trainer.should_stop


def test_a_gamma_must_stay_low_for_so_many_epochs_in_a_row():
    callback, trainer, module = Shrinking(0.01, 3), Trainer(), Module([1.0, 2.0, 3.0])
    callback.on_train_start(trainer, module)
    low, risen = [0.01, 2.0, -3.0], [0.05, 2.0, 3.0]
    ends = [epoch(callback, trainer, module, gammas) for gammas in (low, low, risen, low, low, low)]
    assert ends == [False] * 5 + [True] and callback.due and callback.low.tolist() == [3, 0, 0]


def test_what_was_tried_is_no_reason_to_stop_until_it_has_risen():
    callback, trainer, module = Shrinking(0.01, 1), Trainer(), Module([1.0, 2.0])
    callback.load_state_dict({"low": torch.tensor([4, 0]), "tried": torch.tensor([True, False]), "due": False})
    assert not epoch(callback, trainer, module, [0.001, 2.0])
    assert not epoch(callback, trainer, module, [0.1, 2.0])
    assert epoch(callback, trainer, module, [0.001, 2.0])


def test_the_last_epoch_and_another_callback_end_the_training():
    low = [0.0, 2.0]
    callback, trainer, module = Shrinking(0.01, 1), Trainer(epochs=1), Module(low)
    callback.on_train_start(trainer, module)
    assert not epoch(callback, trainer, module, low) and not callback.due
    callback, trainer = Shrinking(0.01, 1), Trainer()
    callback.on_train_start(trainer, module)
    trainer.should_stop = True
    assert epoch(callback, trainer, module, low) and not callback.due


def test_a_few_channels_do_not_interrupt():
    gammas = [1.0] * 150
    callback, trainer, module = Shrinking(0.01, 1), Trainer(), Module(gammas)
    callback.on_train_start(trainer, module)
    assert not epoch(callback, trainer, module, [0.0, *gammas[1:]])  # one is less than 1% of 150
    assert epoch(callback, trainer, module, [0.0, 0.0, *gammas[2:]])
