"""Factorise the filters of one layer into Lego filters, index and coefficients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from legocompress.cluster.clustering import cluster, clusterings
from legocompress.cluster.pursuit import pursue
from legocompress.cluster.state import TINY
from legocompress.lego.algebra import cut_fragments
from legocompress.lego.shape import UnitShape
from legocompress.lego.storage import balance_scales, round_to_storage
from legocompress.lego.unit import LegoUnit
from legocompress.spec import LegoSpec


@torch.no_grad()
def factorize(weight: Tensor, shape: UnitShape, spec: LegoSpec, seed: int) -> LegoUnit:
    """Turn a dense weight into a Lego unit, rounded as the spec stores it.

    Args:
        weight: (n, c, kh, kw).
        shape: sizes of the unit.
        spec: whether there are coefficients, and the storage types.
        seed: of the clustering.
    """
    return next(factorize_each(weight, [shape], spec, seed))


@torch.no_grad()
def factorize_each(
    weight: Tensor, shapes: Sequence[UnitShape], spec: LegoSpec, seed: int
) -> Iterator[LegoUnit]:
    """Factorise for several shapes that differ in their number of terms alone.

    The results are those of `factorize`; sharing the start of the clustering saves time.
    """
    first = shapes[0]
    rows = cut_fragments(weight, first.n_split).reshape(first.n_fragments, -1)
    terms = [shape.n_terms for shape in shapes]
    units = clusterings(rows, first.n_lego, terms, spec.coefficients, seed)
    for n_terms, factors in zip(terms, units, strict=True):
        slots = (first.n_split, first.n_out, n_terms)
        filters = factors.lego_filters.reshape(first.n_lego, first.width, *first.kernel)
        gains = None
        if factors.coefficients is not None:
            filters, gains = balance_scales(filters, factors.coefficients.reshape(slots))
            gains = round_to_storage(gains, spec.coefficients_dtype)
        filters = round_to_storage(filters, spec.dtype)
        yield LegoUnit(filters, factors.index.reshape(slots), gains)


@torch.no_grad()
def factorize_bank(
    weights: Sequence[Tensor], shapes: Sequence[UnitShape], spec: LegoSpec, seed: int
) -> list[LegoUnit]:
    """Turn the dense weights of several layers into units that use one bank, rounded as stored.

    With coefficients, the squared error of each layer counts relative to its energy, so that a
    layer of small weights is met as well as one of large weights. Without, the filters have to be
    as large as the weights, and all errors count alike. Layers of fewer terms than others get a
    pursuit of their own in the finished bank.

    Args:
        weights: (n, c, kh, kw) of each layer.
        shapes: sizes of the units, with one n_lego, width and kernel.
        spec: whether there are coefficients, and the storage types.
        seed: of the clustering.
    """
    scales = [_energy_scale(weight) if spec.coefficients else 1.0 for weight in weights]
    parts = [
        cut_fragments(weight.float() / scale, shape.n_split).reshape(shape.n_fragments, -1)
        for weight, shape, scale in zip(weights, shapes, scales, strict=True)
    ]
    first = shapes[0]
    most = max(shape.n_terms for shape in shapes)
    factors = cluster(torch.cat(parts), first.n_lego, most, spec.coefficients, seed)
    chosen = [
        _take_terms(part, LegoUnit(factors.lego_filters, index, gains), shape.n_terms)
        for part, shape, index, gains in zip(
            parts, shapes, *_split_slots(factors, [len(part) for part in parts]), strict=True
        )
    ]
    filters = factors.lego_filters
    gains = [unit.coefficients for unit in chosen]
    if spec.coefficients:
        scaled = [
            gain.double() * scale
            for gain, scale in zip(gains, scales, strict=True)
            if gain is not None
        ]
        joined = torch.cat([gain.flatten() for gain in scaled])
        filters, balanced = balance_scales(filters, joined)
        gains = list(torch.split(balanced, [gain.numel() for gain in scaled]))
    filters = round_to_storage(filters, spec.dtype).to(weights[0].dtype)
    filters = filters.reshape(first.n_lego, first.width, *first.kernel)
    units = []
    for shape, unit, gain in zip(shapes, chosen, gains, strict=True):
        slots = (shape.n_split, shape.n_out, shape.n_terms)
        if gain is not None:
            gain = round_to_storage(gain.to(weights[0].dtype), spec.coefficients_dtype)
            gain = gain.reshape(slots)
        units.append(LegoUnit(filters, unit.index.reshape(slots), gain))
    return units


def _energy_scale(weight: Tensor) -> float:
    """The norm of a weight, or one where the weight is zero."""
    return float(weight.double().norm()) or 1.0


def _split_slots(
    unit: LegoUnit, sizes: Sequence[int]
) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """The index and the coefficients of each layer, out of those of all fragments."""
    none: Sequence[Tensor | None] = [None] * len(sizes)
    gains = none if unit.coefficients is None else torch.split(unit.coefficients, list(sizes))
    return torch.split(unit.index, list(sizes)), gains


def _take_terms(rows: Tensor, unit: LegoUnit, n_terms: int) -> LegoUnit:
    """The unit itself, or one of fewer terms per slot with the same bank (m, d)."""
    if unit.index.shape[1] == n_terms:
        return unit
    bank, signed = unit.lego_filters, unit.coefficients is not None
    scale = bank.norm(dim=1).clamp(min=TINY).reciprocal() if signed else bank.new_ones(len(bank))
    unit_bank = bank * scale[:, None]
    index, gains = pursue(rows @ unit_bank.T, unit_bank @ unit_bank.T, n_terms, signed)
    return LegoUnit(bank, index, gains * scale[index] if signed else None)


def dense_weight(layer: nn.Conv2d | nn.Linear, shape: UnitShape) -> Tensor:
    """The weight of a layer as (n, c, kh, kw); a Linear is a 1 x 1 conv."""
    return layer.weight.detach().reshape(shape.n_out, shape.channels, *shape.kernel)


def relative_error(exact: Tensor, approximate: Tensor) -> float:
    """||exact - approximate|| / ||exact|| over all elements; 0 where both are zero."""
    exact = exact.double()
    difference = (exact - approximate.double()).norm()
    return float(difference / exact.norm().clamp(min=torch.finfo(torch.float64).tiny))
