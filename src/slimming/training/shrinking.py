"""`shrink=true`: channels whose gammas have stayed near zero leave the network while it trains.

A shrink is the end of one fit and the beginning of another. The callback ends the fit after an epoch; `let_go` then rewrites
last.ckpt, the network's weights, the optimizer's state and the callback's own counts sliced alike; and the next fit resumes
that file as it would after an interruption. So schedules, GradScaler and other callbacks go on by what they have saved, DDP
wraps the thin network as it wraps any, and a run that was interrupted at any moment ends as one that was not.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn

from slimming import checkpoint
from slimming.channels import surgery
from slimming.channels.criteria import Choice, Criterion
from slimming.channels.penalty import batchnorm_gammas
from slimming.channels.plan import PruningPlan
from slimming.channels.trace import trace
from slimming.errors import ConfigError
from slimming.training.module import parameter_groups

WORTH = 0.01  # share of the gammas that must have newly stayed low: a fit takes a second or several to begin

STAYED_LOW = "StayedLow"  # the criterion that a plan names


class Shrinking(Checkpoint):
    """Counts for how many epochs every penalised gamma has stayed low, and ends the fit when enough of them can leave.

    Low is below `threshold` of the largest. Lightning runs callbacks of this base after the module and all others, in the
    order given. This one must stand before the Recorder, whose last.ckpt takes the counts along, and it sees whether another
    callback has ended the training, which then stays ended.

    Args:
        threshold: share of the largest |gamma|, in (0, 1).
        epochs: for which a gamma must have stayed low, >= 1.

    Attributes:
        low: (gammas,) epochs for which each has been low until now, in the order of the penalty's gammas.
        tried: (gammas,) bool, which of them were to leave, but had to stay; they are no reason to try again.
        due: the fit was ended so that channels can leave.
    """

    def __init__(self, threshold: float, epochs: int) -> None:
        self.threshold, self.epochs = threshold, epochs
        self.low, self.tried, self.due = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.bool), False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        count = sum(map(len, pl_module.penalty.gammas.values()))
        if not len(self.low):
            self.low, self.tried = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.bool)
        assert len(self.low) == count
        if self.due:  # the run was interrupted between the end of a fit and the rewriting of last.ckpt
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        gammas = pl_module.penalty.flat()[: len(self.low)]  # without those that have left
        below = gammas < self.threshold * gammas.max()
        self.low = torch.where(below, self.low + 1, 0)
        self.tried &= below
        new = int(((self.low >= self.epochs) & ~self.tried).sum())
        last = trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
        due = not last and not trainer.should_stop and new > 0 and new >= WORTH * len(gammas)
        self.due = bool(trainer.strategy.broadcast(due))  # equal on all ranks as the gammas are; this makes sure
        trainer.should_stop = trainer.should_stop or self.due
        pl_module.log("gammas_left", float(len(gammas)), sync_dist=True)

    def state_dict(self) -> dict[str, Any]:
        return {"low": self.low, "tried": self.tried, "due": self.due}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.low, self.tried, self.due = state["low"], state["tried"], state["due"]


class Chosen(Criterion):
    """Every unit all of whose gammas are chosen already.

    Args:
        gammas: (all gammas,) bool, in the order of the graph.
        asked: what a plan records of how they were chosen.
    """

    def __init__(self, gammas: Tensor, asked: dict[str, Any]) -> None:
        self.gammas, self.asked = gammas, asked

    def choose(self, choice: Choice) -> Tensor:
        chosen = self.gammas[choice.gammas].to(choice.size.dtype)
        return torch.zeros_like(choice.size).index_add_(0, choice.unit, chosen) == choice.size

    def describe(self) -> dict[str, Any]:
        return self.asked


@dataclass
class Leaving:
    """What lets channels go between two fits.

    Attributes:
        example: (1, C, H, W), in the network's precision.
        layers: patterns of the penalised BatchNorms; None: all.
        decay_batchnorm: as the optimizer's groups were made.
        threshold, epochs: of `Shrinking`.
        round_to: kept channels of every BatchNorm are rounded up to a multiple of this.
    """

    example: Tensor
    layers: list[str] | None
    decay_batchnorm: bool
    threshold: float
    epochs: int
    round_to: int = 1

    def check(self, model: nn.Module) -> None:
        """Raise a SlimmingError unless channels of a network could leave it in the middle of a training."""
        graph = trace(model, self.example)
        if graph.train_reason:
            raise ConfigError(
                "shrink=true: the network does not run in train mode on an image alone, so that layers which run only there "
                f"could not be resized ({graph.train_reason}): train it with shrink=false"
            )

    def let_go(self, path: Path, model: nn.Module) -> PruningPlan | None:
        """Rewrite a training's last.ckpt without the channels that have stayed low.

        Args:
            model: a network as wide as the file's; the file's weights are loaded into it.

        Returns:
            The plan that was followed, which the file's record then ends with; None if all channels had to stay.

        Raises:
            PlanError: the thin network differs from the masked one; the file stays as it was.
        """
        saved = checkpoint.read(path)
        checkpoint.load_weights(model, saved)
        state = saved.content["callbacks"][Shrinking.__qualname__]
        plan = self.plan(model, state["low"], saved.content["epoch"] + 1)
        content = saved.content if plan is None else self._sliced(saved.content, model, plan)
        counts = self._kept_counts(state, model, plan)
        checkpoint.write(content | {"callbacks": content["callbacks"] | {Shrinking.__qualname__: counts}}, path)
        return plan

    def plan(self, model: nn.Module, low: Tensor, epoch: int) -> PruningPlan | None:
        """Plan for what has stayed low to leave; None if nothing of it can.

        Args:
            low: (gammas,) epochs for which the penalised gammas have been low.
            epoch: that has ended, counted from 1.
        """
        graph = trace(model, self.example)
        stayed, start = torch.zeros(graph.count, dtype=torch.bool), 0
        for name, gamma in batchnorm_gammas(model, self.layers).items():
            if name in graph.norms:
                stayed[graph.norms[name].all] = low[start : start + len(gamma)] >= self.epochs
            start += len(gamma)
        if not bool((graph.candidates("together") & stayed).any()):
            return None
        asked = {"criterion": STAYED_LOW, "threshold": self.threshold, "epochs": self.epochs, "epoch": epoch}
        plan = graph.plan(Chosen(stayed, asked), round_to=self.round_to)
        return plan if plan.layers else None

    def _sliced(self, content: dict, model: nn.Module, plan: PruningPlan) -> dict:
        """Return a checkpoint's content as it would be had the training been that of the thin network."""
        thin = {checkpoint.PREFIX + key: value for key, value in surgery.prune(model, plan).state_dict().items()}
        weights = {
            key: thin[key].to(value.dtype) if key in thin else value for key, value in content["state_dict"].items()
        }
        names = [name for _, group in parameter_groups(model, self.decay_batchnorm) for name in group]
        states = [surgery.prune_optimizer_state(s, model, plan, names) for s in content["optimizer_states"]]
        parameters = dict(model.named_parameters())
        for entries in (state["state"] for state in states):
            for index, entry in entries.items():
                entries[index] = {key: _laid_out_as(parameters[names[index]], value) for key, value in entry.items()}
        record = content["slimming"] | {"plans": [*content["slimming"]["plans"], plan.to_dict()]}
        return content | {"state_dict": weights, "optimizer_states": states, "slimming": record}

    def _kept_counts(self, state: dict[str, Any], model: nn.Module, plan: PruningPlan | None) -> dict[str, Any]:
        """Return the callback's state for the gammas that stay; those that were to leave have been tried."""
        low = state["low"]
        if plan is not None:
            low = low[staying(batchnorm_gammas(model, self.layers), plan)]
        return {"low": low, "tried": low >= self.epochs, "due": False}


def staying(gammas: dict[str, nn.Parameter], plan: PruningPlan) -> Tensor:
    """Return which of the penalised gammas of a network a plan keeps, as indices in their order."""
    kept, start = [], 0
    for name, gamma in gammas.items():
        kept += [start + channel for channel in plan.keep.get(name, range(len(gamma)))]
        start += len(gamma)
    return torch.tensor(kept)


def _laid_out_as(parameter: Tensor, value: Any) -> Any:
    """Return an optimizer's tensor in the memory layout of its parameter, without which its steps are slow."""
    last = parameter.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last)
    same = isinstance(value, Tensor) and value.ndim == 4
    return value.contiguous(memory_format=torch.channels_last) if last and same else value


def shrinks(plans: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the plans at the end of a record's that a training has made by `let_go`, in order."""
    found: list[dict[str, Any]] = []
    for plan in reversed(list(plans)):
        if plan["asked"].get("criterion") != STAYED_LOW:
            break
        found.insert(0, plan)
    return found
