"""Repair the Lego layers of a network one after the other, on the inputs that they really get."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from legocompress.calibrate.front import Front
from legocompress.calibrate.journal import Journal
from legocompress.calibrate.moments import Moments
from legocompress.calibrate.solve import fit_slots, fit_unit
from legocompress.calibrate.stream import Call, run_to
from legocompress.lego.module import LegoModule, lego_banks, lego_modules
from legocompress.lego.shape import UnitShape
from legocompress.lego.storage import balance_scales, round_to_storage
from legocompress.lego.unit import LegoUnit
from legocompress.state.calibration import LayerRepair

SAMPLES = 32_768
HELD_OUT = 5  # one image of so many tells when to stop
DAMPING = 1e-3
EXACT = 1e-6  # relative squared error below which sums in float32 tell nothing
WIDEST = 6_144  # values of a patch whose products are kept all together


def repair_layers(front: Front, seed: int, journal: Journal | None = None) -> Iterator[LayerRepair]:
    """Repair each Lego layer in the order in which they run, and tell about it.

    Of a layer that shares its bank, only index and coefficients change: the layers before it have
    been fitted to the bank as it is.

    Args:
        front: the original and the network with Lego modules, both in eval mode, and images.
        seed: of the sampled pixels and the clustering.
        journal: of layers repaired before.
    """
    layers = dict(lego_modules(front.networks[1]))
    banks = lego_banks(front.networks[1])
    shared = {name for bank in banks if len(bank) > 1 for name, _ in bank}
    for name in layers:
        if name not in front.steps:
            yield LayerRepair(name=name, note="never ran")
    running = [name for name in layers if name in front.steps]
    for number, name in enumerate(sorted(running, key=lambda n: front.steps[n].enter)):
        front.advance(name)
        row = None if journal is None else journal.take_(name, layers[name])
        if row is None:
            number_seed = (1_000_003 * seed + number) % 2**63
            row = _repair(front, name, layers[name], number_seed, name in shared)
            if journal is not None:
                journal.put(row, layers[name])
        yield row


def _repair(front: Front, name: str, layer: LegoModule, seed: int, is_shared: bool) -> LayerRepair:
    calls, n_calls = next(_calls(front, name))[1], front.steps[name].calls
    if len(calls) != n_calls:
        return LayerRepair(name=name, note=f"runs {len(calls)} convs in {n_calls} calls")
    moments, held_out = _sum_moments(front, name, layer, seed)
    if not (math.isfinite(moments.energy) and bool(moments.square.isfinite().all())):
        return LayerRepair(name=name, note="its inputs hold NaN or infinity")
    before = held_out.error(pad_channels(layer.lego_shape, calls[0].weight))
    if not moments.energy:
        return LayerRepair(name=name, note="the original's outputs are zero")
    if before < EXACT:
        return LayerRepair(name=name, before=before**0.5, after=before**0.5)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    shape, unit = layer.lego_shape, read_unit(layer)
    if is_shared:
        write_slots_(layer, fit_slots(shape, unit, moments, held_out))
    else:
        write_unit_(layer, fit_unit(shape, unit, moments, held_out, seed))
    # Read the effective weight again, since the class of the layer may standardise it.
    after = held_out.error(pad_channels(layer.lego_shape, next(_calls(front, name))[1][0].weight))
    if not after < before:
        layer.load_state_dict(state)
        after = before
    return LayerRepair(name=name, before=before**0.5, after=after**0.5)


def _calls(front: Front, name: str) -> Iterator[tuple[list[Call], list[Call]]]:
    """Yield the convs that the layer runs in both networks, batch by batch."""
    n_calls = front.steps[name].calls
    for original, model, images in front.batches():
        yield (
            run_to(original, original.get_submodule(name), n_calls, images),
            run_to(model, model.get_submodule(name), n_calls, images),
        )


def _sum_moments(front: Front, name: str, layer: LegoModule, seed: int) -> tuple[Moments, Moments]:
    """Sum moments over sampled pixels: of the images to fit, and of the held-out images."""
    shape = layer.lego_shape
    channels = shape.n_split * shape.width
    patch = channels * shape.kernel[0] * shape.kernel[1]
    parts = 1 if patch <= WIDEST else shape.n_split
    device = layer.lego_filters.device
    both = [Moments(shape.groups, patch, shape.n_out, parts, device) for _ in range(2)]
    per_image = -(-SAMPLES // sum(len(images) for images in front.images))
    generator = torch.Generator().manual_seed(seed)
    filters, first = None, 0
    for theirs, ours in _calls(front, name):
        per_call = -(-per_image // len(ours))
        for target, call in zip(theirs, ours, strict=True):
            image, position = sample(len(call.x), math.prod(call.size), per_call, generator)
            is_held_out = (image + first) % HELD_OUT == HELD_OUT - 1
            filters = pad_channels(layer.lego_shape, target.weight)
            x = call.patches(image, position, channels).float()
            original_x = target.patches(image, position, channels).float()
            y = torch.einsum("pgd,gnd->pgn", original_x, filters)
            both[0].add(x[~is_held_out], y[~is_held_out])
            both[1].add(x[is_held_out], y[is_held_out])
        first += len(ours[0].x)
    assert filters is not None
    both[0].finish(filters, DAMPING)
    both[1].finish(filters)
    return both[0], both[1]


def pad_channels(shape: UnitShape, weight: Tensor) -> Tensor:
    """A dense weight (n, c/g, kh, kw) as filters (g, n/g, D) with the unit's padded channels."""
    missing = shape.n_split * shape.width - shape.channels
    filters = F.pad(weight.float(), (0, 0, 0, 0, 0, missing))
    return filters.reshape(shape.groups, shape.n_out // shape.groups, -1)


def read_unit(layer: LegoModule) -> LegoUnit:
    """The unit that a layer holds, in float32, its filters as a bank (m, d)."""
    gains = None if layer.coefficients is None else layer.coefficients.detach().float()
    bank = layer.lego_filters.detach().float().flatten(1)
    return LegoUnit(bank, layer.index, gains)


@torch.no_grad()
def write_unit_(layer: LegoModule, unit: LegoUnit) -> None:
    """Write a unit into the layer, rounded to its storage dtypes."""
    filters = unit.lego_filters.reshape(layer.lego_filters.shape)
    if layer.coefficients is not None:
        assert unit.coefficients is not None
        filters, gains = balance_scales(filters, unit.coefficients)
        layer.coefficients.copy_(round_to_storage(gains, layer.coefficients_dtype))
    layer.lego_filters.copy_(round_to_storage(filters, layer.storage_dtype))
    layer.index.copy_(unit.index)
    layer.frozen_weight = None


@torch.no_grad()
def write_slots_(layer: LegoModule, unit: LegoUnit) -> None:
    """Write index and coefficients of a unit into the layer, rounded to their storage dtype."""
    if layer.coefficients is not None:
        assert unit.coefficients is not None
        layer.coefficients.copy_(round_to_storage(unit.coefficients, layer.coefficients_dtype))
    layer.index.copy_(unit.index)
    layer.frozen_weight = None


@torch.no_grad()
def round_bank_(modules: Sequence[LegoModule]) -> None:
    """Round the modules of one bank to their storage dtypes, their coefficients scaled to fit."""
    if len(modules) == 1:
        return write_unit_(modules[0], read_unit(modules[0]))
    bank = modules[0].lego_filters
    units = [read_unit(module) for module in modules]
    gains = [unit.coefficients for unit in units if unit.coefficients is not None]
    filters = bank.detach().float()
    scale = 1.0
    if gains:
        largest = torch.stack([gain.abs().max() for gain in gains]).max()
        filters, scaled = balance_scales(filters, largest)
        scale = float(scaled / largest) if largest > 0 else 1.0
    bank.copy_(round_to_storage(filters, modules[0].storage_dtype))
    for module, unit in zip(modules, units, strict=True):
        if unit.coefficients is not None:
            unit = unit._replace(coefficients=unit.coefficients * scale)
        write_slots_(module, unit)


def sample(
    n_images: int, n_pixels: int, per_image: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw pixels of every image without repetition: image (P,) and position (P,)."""
    if per_image >= n_pixels:
        position = torch.arange(n_pixels).repeat(n_images)
    else:
        position = torch.rand(n_images, n_pixels, generator=generator).topk(per_image).indices
    return torch.arange(n_images).repeat_interleave(min(per_image, n_pixels)), position.flatten()
