"""What one sees while it trains: a bar for the running epoch, a line for each finished one."""

import time

from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

REFRESH_EVERY_S = 0.5  # each refresh waits for the device
HEAD = (
    f"{'epoch':>9} {'loss':>8} {'penalty':>8} {'train':>7} {{}} {'lr':>8} {'images/s':>9} {'gamma<1%':>9} {'time':>7}"
)


class EpochLines(ProgressBar):
    """One Rich bar with the running loss, penalty, accuracy and images/s; one line per epoch, also in a log file."""

    def __init__(self):
        super().__init__()
        self._enabled, self._headed = True, False
        self._bar: Progress | None = None
        self._console = Console(highlight=False, soft_wrap=True)
        self._score = "acc"

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_fit_start(self, trainer, module) -> None:
        self._score = module.score
        if self._enabled and not self._headed:  # fits that follow one another are one table
            self._headed = True
            score = "val" if "val" in trainer.datamodule.splits else "test"
            self._console.print(HEAD.format(f"{score:>7}"), style="bold")

    def on_train_epoch_start(self, trainer, module) -> None:
        if not (self._enabled and self._console.is_terminal):
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self._console, transient=True)
        title = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        self._task = self._bar.add_task(title, total=trainer.num_training_batches, state="")
        self._bar.start()
        self._started, self._shown, self._seen = time.monotonic(), 0.0, 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if self._bar is None:
            return
        self._seen += len(batch[1]) * trainer.world_size
        if time.monotonic() - self._shown > REFRESH_EVERY_S:
            self._shown = time.monotonic()
            accuracy = module.running_accuracy()
            state = (
                f"loss {float(outputs['loss']):.3f}  penalty {float(module.penalty.value()):.3f}  "
                + ("" if accuracy is None else f"train {accuracy:6.1%}  ")
                + f"{self._seen / (time.monotonic() - self._started):.0f} images/s"
            )
            self._bar.update(self._task, completed=batch_idx + 1, state=state)

    def on_train_epoch_end(self, trainer, module) -> None:
        self._stop()

    def on_exception(self, trainer, module, exception) -> None:
        self._stop()

    def show(self, row: dict, max_epochs: int) -> None:
        """Print the line of a finished epoch; `row` as in the history."""
        if self._enabled:
            train, val, test = (row.get(f"{split}/{self._score}") for split in ("train", "val", "test"))
            scores = (train, test if val is None else val)
            shown = " ".join(f"{'-' if score is None else format(score, '7.2%'):>7}" for score in scores)
            self._console.print(
                f"{row['epoch']:>5}/{max_epochs:<3} {row['train/loss']:8.4f} {row['train/penalty']:8.4f} "
                f"{shown} {row['lr']:8.2g} "
                f"{row['images_per_s']:9.0f} {row['gamma_near_zero']:9.1%} {row['time_s']:6.1f}s"
            )

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
