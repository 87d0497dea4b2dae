"""SlimmingCallback gives any LightningModule what SlimmingModule has: compared with the penalty inside the loss."""

import lightning.pytorch as pl
import pytest
import torch
from reference import PENALTIES, SPARSITY, InLoss, Net, fit
from torch.nn import functional as F

import slimming
from slimming.data import Digits
from slimming.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")


class Plain(pl.LightningModule):
    """A module that knows nothing of slimming; takes what SlimmingModule takes."""

    def __init__(self, model, num_classes, optimizer, sparsity):
        super().__init__()
        self.model, self.optimizer = model, optimizer

    def forward(self, images):
        return self.model(images)

    def on_train_epoch_start(self):
        self.trainer.datamodule.seed_epoch(self.current_epoch)  # the same augmentation as the reference

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class Several(Plain):
    """Two optimizers, each with a rate of its own, stepped by hand; the second, of bn2's gammas, rests every other time."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        self.manual_backward(0.0 * super().training_step(batch, batch_idx))
        for optimizer in (first, second)[: 1 + batch_idx % 2]:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        gammas = [self.model.bn2.weight]
        rest = [p for p in self.parameters() if p is not gammas[0]]
        return torch.optim.SGD(rest, 0.1), torch.optim.SGD(gammas, 0.5)


class Manual(Plain):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def same(a, b, tolerance=1e-12):
    for (name, x), y in zip(a.model.state_dict().items(), b.model.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


TOLD = {"polarization": {"t": 1.2}, "group": {"example": torch.zeros(1, 1, 8, 8)}}


def with_callback(kind, penalty="l1", **setting):
    callback = slimming.SlimmingCallback(SPARSITY, penalty=penalty, **TOLD.get(penalty, {}))
    return fit(kind, callbacks=[callback], **setting)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("setting", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.05}], ids=str)
def test_equals_the_penalty_in_the_loss(setting, penalty):
    setting = setting | {"precision": "64-true", "penalty": penalty}
    same(with_callback(Plain, **setting), fit(InLoss, **setting))


@pytest.mark.parametrize("penalty", PENALTIES)
def test_manual_optimization(penalty):
    same(with_callback(Manual, penalty, precision="64-true"), fit(InLoss, penalty=penalty, precision="64-true"))


def test_each_optimizer_moves_its_own_gammas_when_it_steps():
    torch.manual_seed(0)
    before, after = Net(), with_callback(Several, "proximal", precision="64-true").model
    for name, shrinkage in (("bn1", 7 * 0.1), ("bn2", 3 * 0.5)):  # 7 batches, and the second steps 3 times
        was, now = (getattr(model, name).weight.detach().double() for model in (before, after))
        torch.testing.assert_close(now, F.softshrink(was, shrinkage * SPARSITY))


def test_fp16_with_a_scaler():
    scaler = lambda: torch.amp.GradScaler("cpu", init_scale=1024.0)  # noqa: E731
    ours = with_callback(Plain, scaler=scaler(), accumulate_grad_batches=2)
    same(ours, fit(InLoss, scaler=scaler(), accumulate_grad_batches=2), 1e-4)


def test_it_logs_the_gammas_and_takes_patterns():
    callback = slimming.SlimmingCallback(0.5, layers=["model.bn1"])
    module = fit(Plain, callbacks=[callback], precision="64-true")
    assert list(callback.penalty.gammas) == ["model.bn1"]
    logged = module.trainer.callback_metrics
    assert float(logged["train/penalty"]) == pytest.approx(0.5 * float(module.model.bn1.weight.abs().sum()), rel=1e-5)
    assert 0 <= float(logged["gamma_near_zero"]) <= 1


def test_what_it_refuses():
    with pytest.raises(ConfigError, match="sparsity"):
        slimming.SlimmingCallback(-1)
    with pytest.raises(ConfigError, match=r"penalty\.name must be one of"):
        slimming.SlimmingCallback(1e-4, penalty="l2")
    with pytest.raises(ConfigError, match=r"penalty\.t=1 is of penalty=polarization"):
        slimming.SlimmingCallback(1e-4, t=1.0)
    with pytest.raises(ConfigError, match="penalty=group needs an example input"):
        fit(Plain, callbacks=[slimming.SlimmingCallback(1e-4, penalty="group")])
    with pytest.raises(ConfigError, match="matches no BatchNorm"):
        fit(Plain, callbacks=[slimming.SlimmingCallback(1e-4, layers=["nowhere"])])
    module = Plain(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)), 10, torch.optim.SGD, 0)
    trainer = pl.Trainer(max_epochs=1, callbacks=[slimming.SlimmingCallback(1e-4)], logger=False, accelerator="cpu")
    with pytest.raises(ConfigError, match="no BatchNorm with a trainable scale"):
        trainer.fit(module, datamodule=Digits(image_size=8))
