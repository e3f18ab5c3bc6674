"""The numbers of a fine-tuning run as TensorBoard events."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from legocompress.errors import UsageError
from legocompress.finetune.epoch import Epoch


def open_event_writer(target: Path) -> Callable[[Epoch], None]:
    """Return a function that writes an epoch's numbers as TensorBoard events.

    Args:
        target: the run's folder; events go to `tensorboard/` in it.

    Raises:
        UsageError: TensorBoard is not installed.
    """
    try:
        importlib.import_module("tensorboard")
        library = importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise UsageError(
            "--tensorboard needs a package: pip install 'legocompress[tensorboard]'"
        ) from error

    @lru_cache
    def open_writer() -> Any:  # at the first epoch: the run makes its folder before that
        return library.SummaryWriter(str(target / "tensorboard"))

    def write_epoch(epoch: Epoch) -> None:
        step = epoch.progress
        values = {
            "train/loss": step.loss,
            "train/top1": step.top1,
            "train/lr": step.lr,
            "train/index_changes": step.changed,
            "eval/top1": epoch.top1,
            "eval/top5": epoch.top5,
            "eval/agreement": epoch.agreement,
        }
        for name, value in values.items():
            if value is not None:
                open_writer().add_scalar(name, value, step.epoch)
        open_writer().flush()

    return write_epoch
