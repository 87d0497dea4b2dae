"""The penalty inside the loss: the reference that every setting of the Trainer is compared with."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from slimming.data import Digits
from slimming.data.sampler import TensorImages
from slimming.training.module import SlimmingModule
from slimming.training.steering import Steering

SPARSITY = 0.05


class Net(nn.Module):
    """Two BatchNorms that are used, one whose gamma gets no gradient, one gamma that is exactly 0."""

    def __init__(self, unused: bool = True):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, 10)
        if unused:
            self.unused = nn.BatchNorm2d(3)
        with torch.no_grad():
            self.bn1.weight.uniform_(-1, 1)[2] = 0.0
            self.bn2.weight.uniform_(-1, 1)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.relu(self.bn2(self.conv2(x))).mean((2, 3)))


class InLoss(SlimmingModule):
    """Autograd of loss + sparsity * sum |gamma|."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + self.penalty.sparsity * sum(g.abs().sum() for g in self.penalty.gammas.values())

    def on_after_backward(self):
        pass


def fit(
    kind: type[SlimmingModule],
    *,
    steps: int = 7,
    scaler: torch.amp.GradScaler | None = None,
    unused: bool = True,
    steer: float | None = None,
    **kwargs,
) -> SlimmingModule:
    """Train one epoch of `steps` batches; `scaler` asks for fp16 autocast with it, `steer` for sparsity=auto to that share."""
    torch.manual_seed(0)
    model = Net(unused)
    if kwargs.pop("compile", False):
        model.compile()
    module = kind(model, 10, lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=1e-3), sparsity=SPARSITY)
    if scaler is not None:
        kwargs["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
    if steer is not None:
        kwargs["callbacks"] = [Steering(module.penalty, steer, [0.1], 0.9)]
    trainer = make_trainer(limit_train_batches=steps, limit_val_batches=0, **kwargs)
    trainer.fit(module, datamodule=Digits(image_size=8, batch_size=32))
    return module


def evaluate(count: int, **kwargs) -> dict[str, float]:
    """Return loss and accuracy of an untrained network on the first `count` test images, and how many were counted."""
    torch.manual_seed(0)
    module = SlimmingModule(Net(), 10, lambda p: torch.optim.SGD(p, 0.1))
    data = Digits(image_size=8, eval_batch_size=64)
    data.setup()
    test = data.splits["test"]
    data.splits["test"] = TensorImages(test.images[:count], test.labels[:count])
    (found,) = make_trainer(**kwargs).test(module, datamodule=data, verbose=False)
    return found | {"count": module.evaluated["test"]}


def make_trainer(**kwargs) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **({"devices": 1, "max_epochs": 1} | kwargs),
    )
