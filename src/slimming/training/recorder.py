"""What a training leaves behind after every epoch: last.ckpt, metrics.csv, the history."""

import csv
import io
import time
from pathlib import Path

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from slimming import checkpoint
from slimming.files import write_text
from slimming.training.progress import EpochLines
from slimming.training.tracking import step_of_epoch

MEASURED = ("lr", "images_per_s", "time_s")  # of every epoch, beside what the module logs
BINS = torch.cat((torch.zeros(1), torch.logspace(-6, 1, 57)))  # |gamma|: eight bins per decade, the first from 0


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints whole or not at all (Lightning's own goes through the system's temporary folder)."""

    def save_checkpoint(self, checkpoint_: dict, path, storage_options=None) -> None:
        checkpoint.write(checkpoint_, path)


class Recorder(Checkpoint):
    """Closes every epoch: history, gamma histogram, metrics.csv, last.ckpt, best.ckpt where there is validation data.

    Runs after all other callbacks and the module (Lightning calls checkpoint callbacks last), so it sees their metrics.

    Attributes:
        history: one dict per epoch: epoch, train/loss, train/penalty, train/acc, test/... or val/..., lr,
            images_per_s, time_s, gamma_near_zero (share of gammas below 1% of the largest).
        gammas: counts of |gamma| per bin of BINS, first at the start, then after every epoch.
        best: {epoch, val/<score>} of the best epoch, where there is a validation split; val/acc of a classifier.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.history: list[dict] = []
        self.gammas: list[list[int]] = []
        self.best: dict | None = None
        self._evaluated = False

    def on_train_start(self, trainer, module) -> None:
        if not self.gammas:
            self.gammas.append(histogram(module.penalty.flat()))

    def on_train_epoch_start(self, trainer, module) -> None:
        self._start, self._images, self._training_s = time.monotonic(), 0, None
        self._evaluated = False
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]  # at the end it is the next epoch's

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self._images += len(batch[1]) * trainer.world_size
        if trainer.is_last_batch:
            self._training_s = time.monotonic() - self._start

    def on_validation_end(self, trainer, module) -> None:
        self._evaluated = True

    def on_train_epoch_end(self, trainer, module) -> None:
        row = self._row(trainer)
        self.history.append(row)
        self.gammas.append(histogram(module.penalty.flat()))
        for logger in trainer.loggers:  # what Lightning does not know of
            logger.log_metrics({key: row[key] for key in MEASURED}, step_of_epoch(trainer))
        key = f"val/{module.score}"
        if key in row and (self.best is None or row[key] > self.best[key]):
            self.best = {"epoch": row["epoch"], key: row[key]}
            trainer.save_checkpoint(self.folder / "best.ckpt", weights_only=True)  # before last.ckpt, which names it
        trainer.save_checkpoint(self.folder / "last.ckpt")
        if trainer.is_global_zero:
            _write_csv(self.folder / "metrics.csv", self.history)
            if isinstance(trainer.progress_bar_callback, EpochLines):
                trainer.progress_bar_callback.show(row, trainer.max_epochs)

    def _row(self, trainer) -> dict:
        """Return the history's entry of the epoch that ends."""
        elapsed = time.monotonic() - self._start
        # Lightning keeps the metrics of earlier epochs, so those of an evaluation count only where one took place.
        fresh = ("train/", "val/", "test/") if self._evaluated else ("train/",)
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(fresh) or "/" not in k}
        measured = (self._lr, self._images / (self._training_s or elapsed), elapsed)
        return {"epoch": trainer.current_epoch + 1} | metrics | dict(zip(MEASURED, measured, strict=True))

    def state_dict(self) -> dict:
        return {"history": self.history, "gammas": self.gammas, "best": self.best}

    def load_state_dict(self, state: dict) -> None:
        self.history, self.gammas, self.best = state["history"], state["gammas"], state["best"]


def histogram(gammas: torch.Tensor) -> list[int]:
    """Count |gamma| per bin of BINS; what is above the last edge goes into the last bin."""
    return torch.histogram(gammas.clamp(0, float(BINS[-1])), BINS).hist.long().tolist()


def _write_csv(path: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
