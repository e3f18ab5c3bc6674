"""Repair a converted network with unlabelled images: each layer in turn, then all together.

For each layer, `layers.py` streams second moments (`moments.py`, `stream.py`, `front.py`) and fits
the Lego unit to them (`solve.py`). Then `joint.py` re-estimates norms and tunes all layers at once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from legocompress.calibrate.basis import input_bases
from legocompress.calibrate.front import Front
from legocompress.calibrate.joint import (
    JointTuning,
    copy_state,
    reestimate_norms_,
    tune_,
    tune_at_chosen_rate_,
)
from legocompress.calibrate.journal import Journal, hash_states, hash_tensors
from legocompress.calibrate.layers import HELD_OUT, repair_layers, round_bank_
from legocompress.calibrate.preconditions import check_images, check_networks, check_outputs
from legocompress.data.memory import reusing_memory
from legocompress.errors import DataError
from legocompress.lego.module import lego_banks, lego_modules
from legocompress.models.checks import check_network, refuse_quantized
from legocompress.models.in_place import explain_in_place
from legocompress.models.output_errors import OutputErrors, compare_outputs
from legocompress.models.probe import evaluating
from legocompress.state.calibration import Calibration, LayerRepair
from legocompress.state.model_state import lego_state

EPOCHS = 32
STEPS = 32  # least number of steps per epoch, where the smallest batch allows it
FEW = 4  # images in the smallest batch
FEWEST = 2 * HELD_OUT  # least number of images


def gather(batches: Iterable[Any], n_images: int) -> Tensor:
    """Collect the first `n_images` of some batches, images (N, c, H, W) or pairs with labels.

    The images are stored in an unnamed file, so that the system can page them out.

    Raises:
        DataError: there are fewer than ten, or they differ in size.
    """
    pixels: Tensor | None = None
    done = 0
    for batch in batches:
        images = batch if isinstance(batch, Tensor) else batch[0]
        if pixels is None:
            shape = (n_images, *images.shape[1:])
            with tempfile.NamedTemporaryFile() as file:
                size = torch.Size(shape).numel()
                pixels = torch.from_file(file.name, shared=True, size=size).reshape(shape)
        images = images[: n_images - done]
        if images.shape[1:] != pixels.shape[1:]:
            raise DataError(
                f"the images differ in size: {tuple(images.shape[1:])}, {tuple(pixels.shape[1:])}"
            )
        pixels[done : done + len(images)] = images
        done += len(images)
        if done == n_images:
            break
    if pixels is None or done < FEWEST:
        raise DataError(f"{done} images are too few to calibrate on; at least {FEWEST} are needed")
    return pixels[:done]


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
    """Repair a converted network in place, towards the outputs of the original, without labels.

    1. Layers are repaired in the order in which they run. Each layer gets the inputs that the
       repaired layers before it produce.
    2. Norm statistics are re-estimated.
    3. All Lego filters and coefficients are tuned together.

    One image in five is held out. Steps 2 and 3 are undone where the held-out error does not fall:
    that of the centred logits for classifiers, the relative error for others (`OutputErrors`).
    The record is stored as `lego_state(model).calibration`. The same seed gives the same result on
    the same machine. On a CPU, with glibc, memory of feature maps is reused meanwhile and returned
    at the end.

    Args:
        model: a network with Lego modules; its training flags are restored at the end.
        original: the same architecture with the original weights, on the same device.
        images: (N, c, H, W), preprocessed; `gather` collects them from batches.
        seed: of sampled pixels, clustering and the order of batches.
        epochs: epochs of step 3; 0 leaves it out. Choosing between two learning rates takes up to
            an eighth more, and at least one epoch for each.
        batch_size: images that run at once; step 3 takes fewer where there are few in all.
        synthetic: for the record: the images are not photos.
        journal: folder for repaired layers. An interrupted run that is called again with the same
            networks, images and settings continues from it.
        on_layer: called after each layer.
        on_batch: called with the number of batches done, and of all batches, in step 3.

    Raises:
        ConversionError: the original lacks a layer of the model.
        QuantizationError: the model is quantised.
        UsageError: a network takes more than one input, is wrapped, compiled or scripted, or holds
            a lazy layer.
        TrainingError: the network changes a value in place that the gradient of step 3 needs.
        DataError: there are fewer than ten images, a network refuses them, or the outputs are not
            tensors that can be compared, as those of detectors. Nothing has been changed then.
    """
    check_network(model)
    refuse_quantized(model, "calibrate_")
    check_network(original)
    check_networks(model, original)
    check_images(images, FEWEST)
    held_out = torch.arange(len(images)) % HELD_OUT == HELD_OUT - 1
    device = next(model.parameters()).device
    used = images[~held_out].to(device)
    hold_out = torch.split(images[held_out].to(device), batch_size)
    with ExitStack() as stack:
        if device.type == "cpu":
            stack.enter_context(reusing_memory())
        stack.enter_context(evaluating(model))
        stack.enter_context(evaluating(original))
        check_outputs(model, original, used[:2])
        compare = partial(compare_outputs, model, original, hold_out)
        before = compare()

        def judge() -> float:
            return compare().deciding

        front = Front((original, model), torch.split(images.to(device), batch_size))
        sha256 = hash_tensors(images)
        key = f"{sha256} {hash_states(model, original)} {seed} {batch_size}"
        store = None if journal is None else Journal(Path(journal), key)
        rows = []
        for row in repair_layers(front, seed, store):
            rows.append(row)
            if on_layer is not None:
                on_layer(row)
        batches = torch.split(used, batch_size)
        norms = _keep_if_better(model, judge, partial(reestimate_norms_, model, batches))

        def tune_together_() -> None:
            tuning = _prepare_tuning(model, original, used, front.passed, batch_size, seed)
            tune_at_chosen_rate_(model, partial(tune_, tuning), judge, epochs, on_batch)
            for bank in lego_banks(model):
                round_bank_([layer for _, layer in bank])

        with explain_in_place("; epochs=0 (--epochs 0) repairs the layers without this tuning"):
            tuned = epochs > 0 and _keep_if_better(model, judge, tune_together_)
        record = Calibration(
            images=len(images),
            sha256=sha256,
            synthetic=synthetic,
            seed=seed,
            epochs=epochs if tuned else 0,
            norms=norms,
            **describe_errors(before, "before"),
            **describe_errors(compare(), "after"),
            layers=rows,
        )
    lego_state(model).calibration = record
    return record


def describe_errors(errors: OutputErrors, when: str) -> dict[str, Any]:
    """The fields of a calibration record that tell the errors `before` or `after`."""
    values = {
        "error": errors.relative,
        "logit_error": errors.logits,
        "divergence": errors.divergence,
        "agreement": errors.agreement,
    }
    return {f"{name}_{when}": value for name, value in values.items()}


def _prepare_tuning(
    model: nn.Module,
    original: nn.Module,
    images: Tensor,
    points: Sequence[str],
    batch_size: int,
    seed: int,
) -> JointTuning:
    """All Lego values of a model, to be tuned in batches small enough for `STEPS` per epoch."""
    layers = [layer for _, layer in lego_modules(model)]
    return JointTuning(
        model=model,
        original=original,
        images=images,
        values=lego_values(model),
        points=points,
        bases=input_bases(model, layers, images),
        batch_size=min(batch_size, max(FEW, len(images) // STEPS)),
        seed=seed,
    )


def lego_values(model: nn.Module) -> list[nn.Parameter]:
    """List the Lego filters and coefficients of all layers; a shared bank once."""
    pairs = [(layer.lego_filters, layer.coefficients) for _, layer in lego_modules(model)]
    values = {id(value): value for pair in pairs for value in pair if value is not None}
    return list(values.values())


def _keep_if_better(
    model: nn.Module, judge: Callable[[], float], change: Callable[[], None]
) -> bool:
    """Change the model, and undo the change unless `judge` falls; return whether it stays."""
    before = judge()
    state = copy_state(model)
    change()
    if judge() < before:
        return True
    model.load_state_dict(state)
    return False
