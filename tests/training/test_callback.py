"""SlimmingCallback gives any LightningModule what SlimmingModule has: compared with the penalty inside the loss."""

import lightning.pytorch as pl
import pytest
import torch
from reference import SPARSITY, InLoss, fit
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

    def on_train_epoch_start(self):
        self.trainer.datamodule.seed_epoch(self.current_epoch)  # the same augmentation as the reference

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


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


def with_callback(kind, **setting):
    return fit(kind, callbacks=[slimming.SlimmingCallback(SPARSITY)], **setting)


@pytest.mark.parametrize("setting", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.05}], ids=str)
def test_equals_the_penalty_in_the_loss(setting):
    same(with_callback(Plain, precision="64-true", **setting), fit(InLoss, precision="64-true", **setting))


def test_manual_optimization():
    same(with_callback(Manual, precision="64-true"), fit(InLoss, precision="64-true"))


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
    with pytest.raises(ConfigError, match="matches no BatchNorm"):
        fit(Plain, callbacks=[slimming.SlimmingCallback(1e-4, layers=["nowhere"])])
    module = Plain(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)), 10, torch.optim.SGD, 0)
    trainer = pl.Trainer(max_epochs=1, callbacks=[slimming.SlimmingCallback(1e-4)], logger=False, accelerator="cpu")
    with pytest.raises(ConfigError, match="no BatchNorm with a trainable scale"):
        trainer.fit(module, datamodule=Digits(image_size=8))
