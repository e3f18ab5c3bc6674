"""Repair a converted network with unlabelled images: each layer in turn, then all together.

`layers.py` streams second moments of every layer (`moments.py`, `stream.py`, `front.py`) and fits
its Lego unit to them (`solve.py`); `joint.py` re-estimates norms and tunes all layers at once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from legocompress.calibrate.basis import input_bases
from legocompress.calibrate.front import Front
from legocompress.calibrate.joint import (
    agreement,
    copy_of_state,
    output_error,
    reestimate_norms_,
    tune_,
    tune_at_chosen_rate_,
)
from legocompress.calibrate.journal import Journal, digest, state_of
from legocompress.calibrate.layers import HELD_OUT, repair_layers, unit_of, write_
from legocompress.errors import ConversionError, DataError
from legocompress.lego.module import lego_modules
from legocompress.models.probe import evaluating
from legocompress.state.calibration import Calibration, LayerRepair

EPOCHS = 32
STEPS = 32  # at least, in a pass over the images, as long as a step has a few
FEW = 4
FEWEST = 2 * HELD_OUT  # images


def gather(batches: Iterable[Any], n_images: int) -> Tensor:
    """Take the first `n_images` of some batches, images (N, c, H, W) or pairs with labels.

    They are kept in an unnamed file that the system may page out.

    Raises:
        DataError: there are fewer than ten, or they differ in size.
    """
    kept: Tensor | None = None
    done = 0
    for batch in batches:
        images = batch if isinstance(batch, Tensor) else batch[0]
        if kept is None:
            shape = (n_images, *images.shape[1:])
            with tempfile.NamedTemporaryFile() as file:
                size = torch.Size(shape).numel()
                kept = torch.from_file(file.name, shared=True, size=size).reshape(shape)
        images = images[: n_images - done]
        if images.shape[1:] != kept.shape[1:]:
            raise DataError(
                f"the images differ in size: {tuple(images.shape[1:])}, {tuple(kept.shape[1:])}"
            )
        kept[done : done + len(images)] = images
        done += len(images)
        if done == n_images:
            break
    if kept is None or done < FEWEST:
        raise DataError(f"{done} images are too few to calibrate on; at least {FEWEST} are needed")
    return kept[:done]


def calibrate_(
    model: nn.Module,
    original: nn.Module,
    images: Tensor,
    *,
    seed: int = 0,
    epochs: int = EPOCHS,
    batch_size: int = 32,
    synthetic: bool = False,
    journal: str | Path | None = None,
    on_layer: Callable[[LayerRepair], None] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Repair a converted network in place, so that it does what the original does; no labels.

    Layers are repaired in the order in which they run, each on the inputs that the repaired layers
    before it give; norm statistics are re-estimated where that helps; then all Lego filters and
    coefficients are tuned together. Every step is judged on one image in five, which no step uses,
    and undone where it does not help. The record is kept as `model.lego_calibration`. One machine
    gives the same result for the same seed.

    Args:
        model: with Lego modules; its training flags are given back.
        original: the same architecture with the original weights, on the same device.
        images: (N, c, H, W), preprocessed; `gather` makes them of batches.
        seed: of sampled pixels, clustering and the order of batches.
        epochs: passes over the images of the last step; 0 leaves it out. Which of two
            rates is found by up to an eighth more, or by a pass with each where there are few.
        batch_size: images that run at once; fewer in the last step where there are few in all.
        synthetic: for the record: the images are no photos.
        journal: folder that keeps each repaired layer, so that an interrupted run goes on there
            when it is called again with the same networks, images and settings.
        on_layer: called after each layer.
        on_batch: called with the batches of the last step done and in all.

    Raises:
        ConversionError: the original has not the layers of the model.
        DataError: fewer than ten images, or images that a network refuses.
    """
    names = {name for name, _ in original.named_modules()}
    missing = [name for name, _ in lego_modules(model) if name not in names]
    if missing:
        raise ConversionError(
            f"the original has no layer {missing[0]!r}; give the network that was converted, with "
            "its original weights"
        )
    if len(images) < FEWEST:
        raise DataError(f"{len(images)} images are too few to calibrate on; give {FEWEST} or more")
    held_out = torch.arange(len(images)) % HELD_OUT == HELD_OUT - 1
    device = next(model.parameters()).device
    used = images[~held_out].to(device)
    kept = torch.split(images[held_out].to(device), batch_size)
    with evaluating(model), evaluating(original):
        judge = partial(output_error, model, original, kept)
        before, agreed = judge(), agreement(model, original, kept)
        front = Front((original, model), torch.split(images.to(device), batch_size))
        sha256 = digest(images)
        key = f"{sha256} {state_of(model, original)} {seed} {batch_size}"
        book = None if journal is None else Journal(Path(journal), key)
        rows = []
        for row in repair_layers(front, seed, book):
            rows.append(row)
            if on_layer is not None:
                on_layer(row)
        batches = torch.split(used, batch_size)
        norms = _keep_if_better(model, judge, partial(reestimate_norms_, model, batches))

        def tune() -> None:
            size = min(batch_size, max(FEW, len(used) // STEPS))
            run = partial(
                tune_,
                model,
                original,
                used,
                lego_values(model),
                front.passed,
                batch_size=size,
                seed=seed,
                bases=input_bases(model, [layer for _, layer in lego_modules(model)], used),
            )
            tune_at_chosen_rate_(model, run, judge, epochs, on_batch)
            for _, layer in lego_modules(model):
                write_(layer, unit_of(layer))  # as the storage types hold the values

        tuned = epochs > 0 and _keep_if_better(model, judge, tune)
        record = Calibration(
            images=len(images),
            sha256=sha256,
            synthetic=synthetic,
            seed=seed,
            epochs=epochs if tuned else 0,
            norms=norms,
            error_before=before,
            error_after=judge(),
            agreement_before=agreed,
            agreement_after=agreement(model, original, kept),
            layers=rows,
        )
    noted: Any = model
    noted.lego_calibration = record
    return record


def lego_values(model: nn.Module) -> list[nn.Parameter]:
    """Lego filters and coefficients of all layers."""
    pairs = [(layer.lego_filters, layer.coefficients) for _, layer in lego_modules(model)]
    return [value for pair in pairs for value in pair if value is not None]


def _keep_if_better(
    model: nn.Module, judge: Callable[[], float], change: Callable[[], None]
) -> bool:
    """Change the model, and change it back unless `judge` falls; whether it stays."""
    before = judge()
    state = copy_of_state(model)
    change()
    if judge() < before:
        return True
    model.load_state_dict(state)
    return False
