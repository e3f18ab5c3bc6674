"""Failures during training, turned into errors that say which setting to change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from legocompress.errors import TrainingError, first_line
from legocompress.finetune.recipe import Recipe
from legocompress.models.in_place import explain_in_place


def make_divergence_error(what: str, recipe: Recipe, epoch: int) -> TrainingError:
    """Create the error of a run whose loss or weights are NaN or infinite; `what` names them."""
    return TrainingError(
        f"{what} in epoch {epoch + 1}; what was saved before is still good. Lower the rate (--set "
        f"optimizer.lr={recipe.optimizer.lr / 3:.2g}), warm up longer (--set "
        "schedule.warmup_epochs=1) or clip gradients (--set clip.value=1)"
    )


def check_finite(model: nn.Module, recipe: Recipe, epoch: int) -> None:
    """Check a network before it is saved.

    Raises:
        TrainingError: a weight or statistic is NaN or infinite.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise make_divergence_error(f"{name} holds NaN or infinity", recipe, epoch)


@contextlib.contextmanager
def explain_failures(recipe: Recipe, epoch: int) -> Iterator[None]:
    """Turn known failures of PyTorch into errors that say what to change; pass on all others.

    Raises:
        TrainingError: memory is exhausted, a process that reads images or trains has died, or the
            network changes a value in place that its gradient needs.
    """
    try:
        with explain_in_place():
            yield
    except (MemoryError, RuntimeError) as error:
        if _is_out_of_memory(error):
            raise TrainingError(
                f"out of memory in epoch {epoch + 1}; what was saved before is still good. "
                + "; ".join(_suggest_memory_savings(recipe, epoch))
            ) from error
        text = str(error).lower()
        if "dataloader worker" in text:
            raise TrainingError(
                f"a process that reads images has died ({first_line(error)}); take fewer "
                "with --workers, or none with --workers 0"
            ) from error
        if type(error).__name__ == "DistBackendError" or "gloo" in text or "nccl" in text:
            raise TrainingError(
                f"another process has died in epoch {epoch + 1}; what was saved before is still "
                "good, and --resume continues from it"
            ) from error
        raise


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return (
        isinstance(error, (MemoryError, torch.OutOfMemoryError))
        or "can't allocate memory" in text
        or "not enough memory" in text
    )


def _suggest_memory_savings(recipe: Recipe, epoch: int) -> list[str]:
    """The settings that would lower the memory that a recipe needs in an epoch."""
    n_parts = 2 * recipe.accumulate
    if recipe.batch_size % n_parts == 0:
        smaller = f"accumulate={n_parts}"
    else:
        smaller = f"batch_size={recipe.batch_size // 2 or 1}"
    tips = [f"--set {smaller} computes fewer images at once"]
    if recipe.amp == "off":
        tips.append("--set amp=bf16 halves the memory for feature maps")
    if recipe.stage_of(epoch).indices != "frozen":
        tips.append("'indices: frozen' needs no N (`inspect` shows its size)")
    return tips
