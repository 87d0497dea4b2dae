"""The penalty inside the loss: the reference that every setting of the Trainer is compared with."""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from slimming.data import Digits
from slimming.data.sampler import TensorImages
from slimming.training.module import SlimmingModule
from slimming.training.steering import Steering

SPARSITY = 0.05
TOLD = {  # to the module, by penalty
    "proximal": {"penalty": "proximal"},
    "polarization": {"penalty": "polarization", "penalty_t": 1.2},
    "group": {"penalty": "group", "example": torch.zeros(1, 1, 8, 8)},
}
PENALTIES = ("l1", *TOLD)


class Net(nn.Module):
    """Two BatchNorms that write into one stream, one whose gamma gets no gradient, one gamma that is exactly 0."""

    def __init__(self, unused: bool = True):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 10)
        if unused:
            self.unused = nn.BatchNorm2d(3)
        with torch.no_grad():
            self.bn1.weight.uniform_(-1, 1)[2] = 0.0
            self.bn2.weight.uniform_(-1, 1)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.relu(x + self.bn2(self.conv2(x))).mean((2, 3)))


def formula(name: str, model: Net) -> torch.Tensor:
    """Return what a penalty adds to the loss at sparsity 1, written by hand."""
    norms = [m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    if name == "l1":
        return sum(g.abs().sum() for g in norms)
    if name == "polarization":
        flat = torch.cat(norms)
        return 1.2 * flat.abs().sum() - (flat - flat.mean()).abs().sum()
    if name == "group":
        pairs = torch.stack((model.bn1.weight, model.bn2.weight))
        return 2**0.5 * pairs.square().sum(0).sqrt().sum() + sum(g.abs().sum() for g in norms[2:])
    return torch.zeros(())  # proximal


class InLoss(SlimmingModule):
    """Autograd of loss + sparsity * penalty, and its second moment where the optimizer has stepped."""

    def __init__(self, *args, penalty="l1", penalty_t=None, example=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.name = penalty

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + SPARSITY * formula(self.name, self.model)

    def on_after_backward(self):
        pass

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = scaler.get_scale() if scaler else 0
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if scaler and scaler.get_scale() < scale:  # it skipped the step
            return
        for gamma in self.penalty.gammas.values():
            if self.name == "proximal":
                gamma.data = F.softshrink(gamma.data, optimizer.param_groups[0]["lr"] * SPARSITY)
            if self.name == "polarization":
                gamma.data = gamma.data.clamp(0, 1)


def fit(
    kind: type[SlimmingModule],
    *,
    steps: int = 7,
    scaler: torch.amp.GradScaler | None = None,
    unused: bool = True,
    steer: float | None = None,
    penalty: str = "l1",
    momentum: float = 0.9,
    fused: bool = False,
    sparsity: float = SPARSITY,
    **kwargs,
) -> SlimmingModule:
    """Train one epoch of `steps` batches; `scaler` asks for fp16 autocast with it, `steer` for sparsity=auto to that share."""
    torch.manual_seed(0)
    model = Net(unused)
    if kwargs.pop("compile", False):
        model.compile()
    told = TOLD.get(penalty, {}) if issubclass(kind, SlimmingModule) else {}
    optimizer = lambda p: torch.optim.SGD(p, 0.1, momentum, weight_decay=1e-3, fused=fused)  # noqa: E731
    module = kind(model, 10, optimizer, sparsity=sparsity, **told)
    if scaler is not None:
        kwargs["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
    if steer is not None:
        kwargs["callbacks"] = [Steering(module.penalty, steer, [0.1], 0.9)]
    resumed = kwargs.pop("ckpt_path", None)
    trainer = make_trainer(limit_train_batches=steps, limit_val_batches=0, **kwargs)
    trainer.fit(module, datamodule=Digits(image_size=8, batch_size=32), ckpt_path=resumed)
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
