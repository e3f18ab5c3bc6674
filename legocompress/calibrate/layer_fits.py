"""Fit Lego forms of single layers to the original's own inputs, all other layers unchanged.

Clustering alone says little about what a layer costs: calibration repairs most of the error of some
layers and little of others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from legocompress.calibrate.layers import DAMPING, HELD_OUT, SAMPLES, WIDEST, pad_channels, sample
from legocompress.calibrate.moments import Moments
from legocompress.calibrate.solve import fit_unit, padded_filters
from legocompress.calibrate.stream import Call, hear_calls
from legocompress.compress.factorize import dense_weight, factorize, relative_error
from legocompress.lego.algebra import assemble
from legocompress.lego.shape import UnitShape
from legocompress.lego.storage import balance_scales, round_to_storage
from legocompress.lego.unit import LegoUnit
from legocompress.spec import LegoSpec


@dataclass(frozen=True)
class FittedForm:
    """One form of a layer: relative errors, and the change of its weight, in the weight's shape.

    `output_error` is None where the layer was only clustered.
    """

    shape: UnitShape
    weight_error: float
    output_error: float | None
    change: Tensor


class LayerMoments:
    """The moments of the inputs of some layers, streamed over images.

    Args:
        layers: by name, with the shape of a form; all forms must pad the channels alike.
        n_images: number of images to come.
        seed: of the sampled pixels.
    """

    def __init__(
        self,
        layers: Mapping[str, tuple[nn.Conv2d | nn.Linear, UnitShape]],
        n_images: int,
        seed: int,
    ) -> None:
        self._layers = layers
        self._names = {id(layer): name for name, (layer, _) in layers.items()}
        self._sums: dict[str, tuple[Moments, Moments]] = {}
        self._changed: set[str] = set()
        self._generator = torch.Generator().manual_seed(seed)
        self._per_image = -(-SAMPLES // n_images)
        self._first = 0  # number of the first image in the batch

    def add_images(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        """Run the network on batches (N, c, H, W), and add what its layers get."""
        fitting = [la for la, shape in self._layers.values() if count_moment_bytes(shape)]
        for images in batches:
            hear_calls(model, fitting, images, self._add)
            self._first += len(images)

    def _add(self, layer: Any, calls: list[Call]) -> None:
        name = self._names[id(layer)]
        shape = self._layers[name][1]
        weight = dense_weight(layer, shape)
        for call in calls:
            if not torch.equal(call.weight.reshape(weight.shape), weight):
                self._changed.add(name)
                return
            image, position = sample(
                len(call.x), math.prod(call.size), self._per_image, self._generator
            )
            x = call.patches(image, position, count_channels(shape)).float()
            if name not in self._sums:
                sizes = (shape.groups, x.shape[2], shape.n_out, 1, x.device)
                self._sums[name] = Moments(*sizes), Moments(*sizes)
            y = torch.einsum("pgd,gnd->pgn", x, pad_channels(shape, weight))
            held = (image + self._first) % HELD_OUT == HELD_OUT - 1
            seen, held_out = self._sums[name]
            seen.add(x[~held], y[~held])
            held_out.add(x[held], y[held])

    def finish(self, name: str) -> tuple[Moments, Moments] | str:
        """Return the moments to fit to and the held-out ones, or why the layer is not fitted."""
        if name in self._changed:
            return "its class changes the weight, so it is only clustered"
        if name not in self._sums:
            return "its patches are too wide to be fitted, or it never ran"
        seen, held_out = self._sums.pop(name)
        if not all(bool(m.square.isfinite().all()) and m.energy > 0 for m in (seen, held_out)):
            return "its inputs or outputs are zero or not finite, so it is only clustered"
        layer, shape = self._layers[name]
        filters = pad_channels(shape, dense_weight(layer, shape))
        seen.finish(filters, DAMPING)
        held_out.finish(filters)
        return seen, held_out


def count_channels(shape: UnitShape) -> int:
    """Channels per group, with those that pad the last fragment."""
    return shape.n_split * shape.width


def count_moment_bytes(shape: UnitShape) -> int:
    """Bytes of the moments of one layer; 0 where its patches are too wide to be fitted."""
    patch = count_channels(shape) * math.prod(shape.kernel)
    return 2 * 4 * shape.groups * patch**2 if patch <= WIDEST else 0


@torch.no_grad()
def fit_form(
    layer: nn.Conv2d | nn.Linear,
    shape: UnitShape,
    spec: LegoSpec,
    moments: tuple[Moments, Moments] | None,
    seed: int,
) -> FittedForm:
    """Cluster a form of a layer, and fit it where there are moments, rounded as the spec stores it.

    Args:
        layer: stays as it is.
        shape: sizes of the form.
        spec: of the layer.
        moments: to fit to, and to stop by; None to cluster only.
        seed: of the clustering.
    """
    weight = dense_weight(layer, shape)
    unit = factorize(weight, shape, spec, seed)
    error = relative_error(weight, assemble(shape, unit))
    output_error = None
    if moments is not None:
        seen, held_out = moments
        unit = _flatten(unit)
        before = held_out.error(padded_filters(shape, unit))
        fitted = _round(fit_unit(shape, unit, seen, held_out, seed), spec)
        after = held_out.error(padded_filters(shape, fitted))
        unit = fitted if after < before else unit
        output_error = min(before, after) ** 0.5
    change = assemble(shape, unit).to(weight.dtype) - weight
    return FittedForm(shape, error, output_error, change.reshape(layer.weight.shape))


def _flatten(unit: LegoUnit) -> LegoUnit:
    gains = None if unit.coefficients is None else unit.coefficients.float()
    return LegoUnit(unit.lego_filters.float().flatten(1), unit.index, gains)


def _round(unit: LegoUnit, spec: LegoSpec) -> LegoUnit:
    filters, gains = unit.lego_filters, unit.coefficients
    if gains is not None:
        filters, gains = balance_scales(filters, gains)
        gains = round_to_storage(gains, spec.coefficients_dtype)
    return LegoUnit(round_to_storage(filters, spec.dtype), unit.index, gains)
