"""What can go wrong while training, and what to change then."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from legocompress.errors import TrainingError, first_line
from legocompress.finetune.recipe import Recipe


def diverged(what: str, recipe: Recipe, epoch: int) -> TrainingError:
    """The error of a run whose numbers are none any more."""
    return TrainingError(
        f"{what} in epoch {epoch + 1}; what was saved before is still good. Lower the rate (--set "
        f"optimizer.lr={recipe.optimizer.lr / 3:.2g}), warm up longer (--set "
        "schedule.warmup_epochs=1) or clip gradients (--set clip.value=1)"
    )


def check_finite(model: nn.Module, recipe: Recipe, epoch: int) -> None:
    """Raise TrainingError if a weight or statistic is NaN or infinite, so that none is saved."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise diverged(f"{name} holds NaN or infinity", recipe, epoch)


@contextlib.contextmanager
def explained(recipe: Recipe, epoch: int) -> Iterator[None]:
    """Tell what to change where memory is out or a reader has died."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error).lower()
        out = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if out or "can't allocate memory" in text or "not enough memory" in text:
            more = 2 * recipe.accumulate
            fits = recipe.batch_size % more == 0
            smaller = f"accumulate={more}" if fits else f"batch_size={recipe.batch_size // 2 or 1}"
            frozen = recipe.stage_of(epoch).indices == "frozen"
            tips = [f"--set {smaller} computes fewer images at once"]
            tips += [] if recipe.amp != "off" else ["--set amp=bf16 takes half the memory for maps"]
            tips += [] if frozen else ["'indices: frozen' needs no N (`inspect` tells its size)"]
            raise TrainingError(
                f"out of memory in epoch {epoch + 1}; what was saved before is still good. "
                + "; ".join(tips)
            ) from error
        if "dataloader worker" in text:
            raise TrainingError(
                f"a process that reads images has died ({first_line(error)}); take fewer "
                "with --workers, or none with --workers 0"
            ) from error
        if type(error).__name__ == "DistBackendError" or "gloo" in text or "nccl" in text:
            raise TrainingError(
                f"another process has gone in epoch {epoch + 1}; what was saved before is still "
                "good, and --resume goes on from it"
            ) from error
        raise
