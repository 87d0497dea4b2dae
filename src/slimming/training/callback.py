"""The penalty for any LightningModule, and what SlimmingModule shares with it."""

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from torch.utils.hooks import RemovableHandle

from slimming.channels.options import PenaltyOptions, check_penalty
from slimming.channels.penalties import make_penalty
from slimming.channels.penalty import Penalty, near_zero_share
from slimming.errors import ConfigError, check_number
from slimming.training.tracking import log_histogram, step_of_epoch


def loss_factor(trainer: pl.Trainer, module: pl.LightningModule) -> float | torch.Tensor:
    """Return what Lightning multiplied the loss by before backward: 1 / accumulated batches, and a GradScaler's scale."""
    factor: float | torch.Tensor = 1.0
    if module.automatic_optimization:
        factor = 1 / trainer.accumulate_grad_batches
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None:  # gradients are still multiplied by the loss scale here; a tensor waits for no device
        factor = scaler.scale(torch.full((), factor, device=module.device))
    return factor


def log_gammas(module: pl.LightningModule, penalty: Penalty) -> None:
    """Log an epoch's penalty, the share of gammas near zero, and their histogram where a logger takes one."""
    gammas = penalty.flat()  # (number of gammas,)
    module.log("train/penalty", penalty.value(), sync_dist=True)
    module.log("gamma_near_zero", near_zero_share(gammas), sync_dist=True)
    for logger in module.trainer.loggers if len(gammas) else ():
        log_histogram(logger, "gamma", gammas, step_of_epoch(module.trainer))


class Following:
    """Lets a penalty follow the optimizers of one fit after the other, each optimizer once."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def begin(self, trainer: pl.Trainer, penalty: Penalty) -> None:
        self.end()  # of a fit that broke off
        self._handles = [penalty.follow(optimizer) for optimizer in trainer.optimizers]

    def end(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


class SlimmingCallback(pl.Callback):
    """Adds the gradient of sparsity * sum |gamma|, or another penalty, to any LightningModule; logs how the gammas fall.

    Equal to autograd of the penalised loss under gradient accumulation, GradScaler and DDP, as SlimmingModule. Logs
    `train/penalty` and `gamma_near_zero` (share of gammas below 1% of the largest) at the end of every epoch, and a histogram
    `gamma` to TensorBoard, Weights & Biases and MLflow.

    Args:
        sparsity: lambda, >= 0.
        layers: shell patterns of BatchNorm layer names in the LightningModule (`backbone.*`); None: all with a trainable
            scale.
        penalty: `l1`, `proximal`, `polarization` or `group`, see slimming.channels.penalties.
        t: of `polarization`.
        example: an input of the LightningModule, for `group`; None: its `example_input_array`.

    Raises:
        ConfigError: a value that is not allowed; and when training starts: no BatchNorm with a trainable scale, or a pattern
            that matches none.
    """

    def __init__(
        self,
        sparsity: float,
        layers: Iterable[str] | None = None,
        penalty: str = "l1",
        t: float | None = None,
        example: Any = None,
    ):
        check_number("sparsity", sparsity, 0)
        self.sparsity, self.layers = sparsity, None if layers is None else list(layers)
        self.options, self.example = {"name": penalty, "t": t}, example
        check_penalty(PenaltyOptions(layers=self.layers, **self.options))
        self.penalty, self._following = Penalty({}, sparsity), Following()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        example = pl_module.example_input_array if self.example is None else self.example
        if example is not None:
            example = trainer.precision_plugin.convert_input(move_data_to_device(example, pl_module.device))
        self.penalty = make_penalty(pl_module, self.sparsity, example=example, layers=self.layers, **self.options)
        if not self.penalty.gammas:
            raise ConfigError(
                "the module has no BatchNorm with a trainable scale: insert BatchNorm after its convolutions"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._following.begin(trainer, self.penalty)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._following.end()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.penalty.add_gradient(loss_factor(trainer, pl_module))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        log_gammas(pl_module, self.penalty)
