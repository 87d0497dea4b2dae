"""The penalty for any LightningModule, and what SlimmingModule shares with it."""

from collections.abc import Iterable

import lightning.pytorch as pl
import torch

from slimming.channels.penalty import Penalty, batchnorm_gammas, near_zero_share
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


class SlimmingCallback(pl.Callback):
    """Adds the gradient of sparsity * sum |gamma| to any LightningModule, and logs how the gammas fall.

    Equal to autograd of the penalised loss under gradient accumulation, GradScaler and DDP, as SlimmingModule. Logs
    `train/penalty` and `gamma_near_zero` (share of gammas below 1% of the largest) at the end of every epoch, and a histogram
    `gamma` to TensorBoard, Weights & Biases and MLflow.

    Args:
        sparsity: lambda, >= 0.
        layers: shell patterns of BatchNorm layer names in the LightningModule (`backbone.*`); None: all with a trainable
            scale.

    Raises:
        ConfigError: when training starts: no BatchNorm with a trainable scale, or a pattern that matches none.
    """

    def __init__(self, sparsity: float, layers: Iterable[str] | None = None):
        check_number("sparsity", sparsity, 0)
        self.sparsity, self.layers = sparsity, None if layers is None else list(layers)
        self.penalty = Penalty({}, sparsity)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.penalty = Penalty(batchnorm_gammas(pl_module, self.layers), self.sparsity)
        if not self.penalty.gammas:
            raise ConfigError(
                "the module has no BatchNorm with a trainable scale: insert BatchNorm after its convolutions"
            )

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.penalty.add_gradient(loss_factor(trainer, pl_module))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        log_gammas(pl_module, self.penalty)
