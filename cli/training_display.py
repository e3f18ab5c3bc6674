"""What a fine-tuning run shows while it trains."""

from __future__ import annotations

from collections.abc import Sequence

from rich.progress import TextColumn

from legocompress.finetune.epoch import Epoch
from legocompress.finetune.loggers import Logger
from legocompress.finetune.progress import Progress as Step

from .progress import progress_bar


class TrainingDisplay:
    """The live bar of the current epoch, and one line per finished epoch, on standard error.

    Args:
        quiet: show nothing.

        loggers: what gets the numbers of each finished epoch; closed at the end.

    Attributes:
        epochs: all finished epochs.
    """

    def __init__(self, quiet: bool, loggers: Sequence[Logger] = ()):
        self.quiet, self.loggers = quiet, loggers
        self.epochs: list[Epoch] = []
        self.bar = progress_bar(quiet, TextColumn("{task.fields[numbers]}"))
        self.task = self.bar.add_task("epoch 1", total=None, numbers="")

    def __enter__(self) -> TrainingDisplay:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
        for logger in self.loggers:
            logger.close()

    def show_step(self, step: Step) -> None:
        """Move the bar and update the numbers next to it."""
        top1 = "" if step.top1 is None else f" top-1 {step.top1:.1f} %"
        self.bar.update(
            self.task,
            description=f"epoch {step.epoch}/{step.epochs}",
            total=step.updates,
            completed=step.update,
            numbers=f"loss {step.loss:.3f}{top1} {step.images_per_second:.0f} images/s "
            f"{step.changed} indices changed",
        )
        if step.update == step.updates:
            self.bar.update(
                self.task, description=f"epoch {step.epoch}/{step.epochs}: evaluating", total=None
            )

    def record_epoch(self, epoch: Epoch) -> None:
        """Store a finished epoch, print its numbers and log them."""
        self.epochs.append(epoch)
        if not self.quiet:
            self._print_epoch(epoch)
        for logger in self.loggers:
            logger.log(epoch.progress.epoch, epoch.metrics())

    def _print_epoch(self, epoch: Epoch) -> None:
        step = epoch.progress
        values = (("top-1", epoch.top1), ("top-5", epoch.top5), ("agreement", epoch.agreement))
        scores = "  ".join(f"{name} {value:.2f} %" for name, value in values if value is not None)
        mark = "  best" if epoch.best else ""
        self.bar.console.print(
            f"epoch {step.epoch}/{step.epochs}  loss {step.loss:.4f}  {scores}  "
            f"{step.changed} indices changed  {step.images_per_second:.0f} images/s{mark}",
            highlight=False,
            soft_wrap=True,
        )
