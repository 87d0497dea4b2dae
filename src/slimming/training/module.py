"""The LightningModules: what every training shares, and the training of classifiers."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics.classification import MulticlassAccuracy

from slimming.channels.penalties import make_penalty
from slimming.errors import ConfigError, TrainingError
from slimming.training.callback import Following, log_gammas, loss_factor

AUXILIARY_WEIGHT = {"GoogLeNetOutputs": 0.3, "InceptionOutputs": 0.4}  # of each auxiliary head's loss in their papers
CHECK_EVERY = 50  # steps between looks at the loss; each look waits for the device


class PenalisedModule(LightningModule):
    """What every training shares: the penalty, the optimizer, the loss of an epoch over all ranks, the checkpoint's record.

    The penalty never enters the loss: its gradient is added in `on_after_backward`, which equals autograd of the
    penalised loss under gradient accumulation, GradScaler and DDP; what a penalty does to the gammas themselves follows
    every step that the optimizer takes.

    A subclass gives `training_step`, which ends in `account` and `watch_loss`, and `evaluate`; what it measures beside the
    loss begins in `begin` and is logged in `report`.

    Args:
        model: the network.
        optimizer: parameter groups -> optimizer.
        scheduler: optimizer -> learning-rate schedule, stepped once per epoch; None for a constant rate.
        sparsity: lambda, >= 0.
        penalty: `l1`, `proximal`, `polarization` or `group`, see slimming.channels.penalties.
        penalty_layers: patterns of the BatchNorm layers that are penalised; None: all with a trainable scale.
        penalty_t: t of `polarization`.
        example: an input of `model`, for `group`.
        decay_batchnorm: whether weight decay also acts on gamma and beta.
        record: plain data for the checkpoint's "slimming" entry.

    Raises:
        ConfigError: a pattern that matches nothing, or a penalty with a value that is not allowed.
    """

    score: str  # key of what tells how good a network is: logged as test/<score>, in [0, 1]

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        sparsity: float = 0.0,
        penalty_layers: Iterable[str] | None = None,
        decay_batchnorm: bool = True,
        record: dict | None = None,
        penalty: str = "l1",
        penalty_t: float | None = None,
        example: Any = None,
    ):
        super().__init__()
        self.model = model
        layers = None if penalty_layers is None else list(penalty_layers)
        self.penalty = make_penalty(model, sparsity, example=example, name=penalty, layers=layers, t=penalty_t)
        self._following = Following()
        self.optimizer, self.scheduler, self.decay_batchnorm = optimizer, scheduler, decay_batchnorm
        self.record = record
        self.optimizer_state: dict | None = None  # to begin with: `prune_optimizer_state` of an earlier training's
        self._loss_sum: dict[str, torch.Tensor] = {}  # split -> sum over this rank's images of the epoch
        self._count: dict[str, int] = {}  # split -> this rank's images of the epoch
        self.evaluated: dict[str, int] = {}  # split -> images over all ranks when it was last evaluated
        self._bad_step: torch.Tensor | None = None  # first step whose loss was not finite, -1 for none

    def evaluate(self, split: str, batch: Any) -> None:
        """Measure the network on a batch of `val` or `test`, and `account` for its loss."""
        raise NotImplementedError

    def running_accuracy(self) -> float | None:
        """Return the accuracy on this rank's training images of the epoch so far; None where that costs too much to know."""
        return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)

    def validation_step(self, batch, batch_idx: int) -> None:
        self.evaluate(self._validation_split(), batch)

    def test_step(self, batch, batch_idx: int) -> None:
        self.evaluate("test", batch)

    def on_after_backward(self) -> None:
        self.penalty.add_gradient(loss_factor(self.trainer, self))

    def on_train_start(self) -> None:
        self._following.begin(self.trainer, self.penalty)

    def on_train_end(self) -> None:
        self._following.end()

    def on_train_epoch_start(self) -> None:
        self.begin("train")
        self._bad_step = None
        if hasattr(self.trainer.datamodule, "seed_epoch"):
            self.trainer.datamodule.seed_epoch(self.current_epoch)

    def on_validation_epoch_start(self) -> None:
        self.begin(self._validation_split())

    def on_validation_epoch_end(self) -> None:
        self.report(self._validation_split())

    def on_test_epoch_start(self) -> None:
        self.begin("test")

    def on_test_epoch_end(self) -> None:
        self.report("test")

    def on_train_epoch_end(self) -> None:
        self.check_finite()
        self.report("train")
        log_gammas(self, self.penalty)

    def configure_optimizers(self):
        parameters = dict(self.model.named_parameters())
        groups = [
            {"params": [parameters[name] for name in names]} | ({} if decayed else {"weight_decay": 0.0})
            for decayed, names in parameter_groups(self.model, self.decay_batchnorm)
        ]
        optimizer = self.optimizer(groups)
        if self.optimizer_state is not None:  # of each parameter alone; learning rates are those of this training
            optimizer.load_state_dict(optimizer.state_dict() | {"state": self.optimizer_state["state"]})
        return optimizer if self.scheduler is None else ([optimizer], [self.scheduler(optimizer)])

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        if self.record is not None:
            metrics = {k: float(v) for k, v in self.trainer.callback_metrics.items()}
            checkpoint["slimming"] = self.record | {"data": self.trainer.datamodule.statistics(), "metrics": metrics}

    def check_finite(self) -> None:
        """Raise TrainingError if a loss of this epoch, or a weight, is not finite; waits for the device."""
        advice = "lower optimizer.lr or sparsity, or use a wider trainer.precision; last.ckpt is the last good epoch"
        if self._bad_step is not None and (step := int(self._bad_step)) >= 0:
            raise TrainingError(
                f"the loss became NaN or infinite in epoch {self.current_epoch + 1}, step {step}: {advice}"
            )
        weights = [p for p in self.parameters() if p.is_floating_point()]
        if not bool(torch.stack(torch._foreach_norm(weights)).isfinite().all()):
            raise TrainingError(f"a weight became NaN or infinite in epoch {self.current_epoch + 1}: {advice}")

    def watch_loss(self, loss: torch.Tensor, step: int) -> None:
        """Remember the first step of an epoch whose loss is not finite, without waiting for the device; look now and then."""
        if self._bad_step is None:
            self._bad_step = torch.full((), -1, device=loss.device)
        self._bad_step = torch.where(loss.isfinite() | (self._bad_step >= 0), self._bad_step, step)
        if step % CHECK_EVERY == CHECK_EVERY - 1:
            self.check_finite()

    def _validation_split(self) -> str:
        return "val" if "val" in self.trainer.datamodule.splits else "test"

    def begin(self, split: str) -> None:
        """Begin an epoch's account of a split."""
        self._loss_sum[split], self._count[split] = torch.zeros((), device=self.device), 0

    def account(self, split: str, loss: torch.Tensor, count: int) -> None:
        """Add the mean loss of `count` images to the epoch's account."""
        self._loss_sum[split] = self._loss_sum[split] + loss * count
        self._count[split] += count

    def report(self, split: str) -> None:
        """Log the loss of an epoch over all ranks.

        It cannot be a metric object: Lightning's mean over ranks is wrong where they have unequal numbers of images (2.6
        divides the summed batch sizes as integers), and torchmetrics' MeanMetric (1.9) waits for the device at every update
        or ignores the weights.
        """
        count = torch.tensor(float(self._count[split]), device=self.device)
        sums = torch.stack((self._loss_sum[split].float(), count))
        loss, count = self.trainer.strategy.reduce(sums, reduce_op="sum")
        self.evaluated[split] = int(count)
        self.log(f"{split}/loss", loss / count, sync_dist=True)  # equal on all ranks already; this says so


class SlimmingModule(PenalisedModule):
    """Trains a classifier on cross-entropy + sparsity * sum |gamma|, or with another penalty on the gammas.

    Args:
        model: (N, C, H, W) -> (N, num_classes) logits, or a named tuple with auxiliary logits in train mode.
        num_classes: for the accuracy.
        others: as of PenalisedModule.
    """

    score = "acc"

    def __init__(self, model: nn.Module, num_classes: int, *others: Any, **more: Any):
        super().__init__(model, *others, **more)
        accuracy = {"num_classes": num_classes, "average": "micro", "validate_args": False}
        self.accuracy = nn.ModuleDict({f"{s}_acc": MulticlassAccuracy(**accuracy) for s in ("train", "val", "test")})

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch  # (N, C, H, W), (N,)
        _check_labels(labels)
        output = self.model(images)
        logits, *auxiliary = output if isinstance(output, tuple) else (output,)
        loss = self.task_loss(images, logits, labels)
        if auxiliary:
            weight = AUXILIARY_WEIGHT.get(type(output).__name__, 0.3)
            loss = loss + weight * sum(F.cross_entropy(a, labels) for a in auxiliary if a is not None)
        self._account("train", loss.detach(), logits.detach(), labels)
        self.watch_loss(loss.detach(), batch_idx)
        return loss

    def task_loss(self, images: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of a training batch, without the penalty and auxiliary heads."""
        return F.cross_entropy(logits, labels)

    def evaluate(self, split: str, batch) -> None:
        images, labels = batch  # (N, C, H, W), (N,)
        _check_labels(labels)
        logits = self.model(images)  # (N, num_classes)
        self._account(split, F.cross_entropy(logits, labels), logits, labels)

    def running_accuracy(self) -> float:
        """Return the accuracy on this rank's training images of the epoch so far.

        The progress bar asks on rank 0 alone; `compute` would wait there for the other ranks.
        """
        metric = self.accuracy["train_acc"]
        return float(metric.tp / (metric.tp + metric.fn))

    def begin(self, split: str) -> None:
        super().begin(split)
        self.accuracy[f"{split}_acc"].reset()

    def report(self, split: str) -> None:
        super().report(split)
        self.log(f"{split}/acc", self.accuracy[f"{split}_acc"])  # a metric object: it adds up the ranks

    def _account(self, split: str, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        self.accuracy[f"{split}_acc"].update(logits, labels)
        self.account(split, loss, len(labels))


def _check_labels(labels: Any) -> None:
    if not isinstance(labels, torch.Tensor):
        raise ConfigError(
            "these data are images with boxes: give task=detection and a detector, such as model=yolov3_tiny"
        )


def parameter_groups(model: nn.Module, decay_batchnorm: bool) -> list[tuple[bool, list[str]]]:
    """Name the trainable parameters in the order in which the optimizer gets them: (with weight decay?, names) per group."""
    norm, rest = [], []
    owners = dict(model.named_modules())
    for name, parameter in model.named_parameters():  # a shared one once
        owner = owners[name.rpartition(".")[0]]
        kind = norm if isinstance(owner, nn.modules.batchnorm._BatchNorm) and not decay_batchnorm else rest
        kind += [name] if parameter.requires_grad else []
    return [(True, rest)] + [(False, norm)] * bool(norm)
