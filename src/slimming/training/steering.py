"""`sparsity=auto`: lambda follows the gammas during the run, so that the asked share of them reaches zero."""

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from slimming.channels.penalty import Penalty, near_zero_share
from slimming.errors import check_number

ARRIVAL = 1 / 6  # the quantile is to be at zero after this share of the shrinkage that is left, at every look anew
LOOKS = 40  # at the gammas in a run, at least; one an epoch where there are more epochs
CHANGE = 2.0  # factor by which lambda changes between two looks, at most
STRONGEST = 4.0  # the largest lambda moves a gamma by so many times the first quantile in an epoch of the largest rate
WEAKEST = 1e-3  # of the largest lambda: from there it can be back within ten looks


class Steering(pl.Callback):
    """Sets lambda during a training with SGD, so that a share `target` of the penalised gammas ends near zero.

    Near zero is below 1% of the largest. That share reads 0 for most of a run, so it says nothing of where the gammas are
    going. What is steered by is the gamma that arrives last: q, the `target` quantile of |gamma|. In one stretch between two
    looks, the penalty alone moves a gamma by lambda * s (`Penalty.reach`; of L1, the sum of lr / (1 - momentum)). The loss
    resists, by as much as the last stretch has shown: there q fell by d. So

        lambda <- lambda + q / S - d / s,    S = s summed until the arrival,

    which adds what was missing to the speed that is needed; the first lambda is q / S. The arrival is a sixth of the way that
    is left, at every look anew, so that q falls fast at first, and lambda has time to be corrected. Where the share is
    reached, lambda is halved: gammas at zero mostly stay there without a penalty, others would follow them with it. Only
    weights go in, which are equal on all ranks, so all ranks set the same lambda.

    Args:
        penalty: whose `sparsity` is set.
        target: share of the gammas, in (0, 1).
        rates: learning rate of every epoch.
        momentum: of SGD, in [0, 1).

    Raises:
        ConfigError: a target out of range.
    """

    def __init__(self, penalty: Penalty, target: float, rates: Sequence[float], momentum: float) -> None:
        check_number("target_ratio", target, 0, 1, above=True, below=True)
        self.penalty, self.target, self.rates, self.momentum = penalty, target, rates, momentum
        self.stretches: dict[int, float] = {}  # optimizer step of a look -> s of the stretch that begins there
        self.epoch_reach = 0.0  # s of an epoch of the largest rate
        self.last: dict[str, float] | None = None  # the last look: step, sparsity, quantile; and the strongest lambda

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        looks = min(steps, math.ceil(LOOKS / len(self.rates)))  # of an epoch
        self.epoch_reach = self._reach(steps * max(self.rates))
        starts = [round(look * steps / looks) for look in range(looks)]
        self.stretches = {
            epoch * steps + start: self._reach((end - start) * rate)
            for epoch, rate in enumerate(self.rates)
            for start, end in zip(starts, [*starts[1:], steps], strict=True)
        }

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step in self.stretches and (self.last is None or self.last["step"] != step):
            self.look(step)

    def _reach(self, lr_sum: float) -> float:
        reach = self.penalty.reach(lr_sum, self.momentum)
        assert reach is not None  # SGD's momentum is known
        return reach

    def look(self, step: int) -> None:
        """Set lambda for the stretch that begins at an optimizer step."""
        gammas = self.penalty.flat()
        quantile = float(torch.quantile(gammas, self.target))
        strongest = self.last["strongest"] if self.last else self._strongest(quantile)
        wanted = self._next(step, quantile, near_zero_share(gammas))
        self.penalty.sparsity = min(max(wanted, WEAKEST * strongest), strongest)
        self.last = {"step": step, "sparsity": self.penalty.sparsity, "quantile": quantile, "strongest": strongest}

    def _strongest(self, quantile: float) -> float:
        return STRONGEST * quantile / self.epoch_reach if self.epoch_reach else 0.0

    def _next(self, step: int, quantile: float, share: float) -> float:
        left = sum(s for start, s in self.stretches.items() if start >= step)
        needed = quantile / (ARRIVAL * left) if left else 0.0
        if self.last is None:
            return needed
        before, passed = self.last["sparsity"], self.stretches[int(self.last["step"])]
        if share >= self.target:
            return before / CHANGE
        if not passed:  # a rate of 0: nothing was shown
            return before
        wanted = before + needed - (self.last["quantile"] - quantile) / passed
        return min(max(wanted, before / CHANGE), before * CHANGE)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.log("sparsity", self.penalty.sparsity, sync_dist=True)

    def state_dict(self) -> dict[str, Any]:
        return {"last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last = state["last"]
        if self.last is not None:
            self.penalty.sparsity = self.last["sparsity"]
