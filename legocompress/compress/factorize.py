"""Factorise the filters of one layer into Lego filters, index and coefficients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from legocompress.cluster.clustering import clusterings
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


def dense_weight(layer: nn.Conv2d | nn.Linear, shape: UnitShape) -> Tensor:
    """The weight of a layer as (n, c, kh, kw); a Linear is a 1 x 1 conv."""
    return layer.weight.detach().reshape(shape.n_out, shape.channels, *shape.kernel)


def relative_error(exact: Tensor, approximate: Tensor) -> float:
    """||exact - approximate|| / ||exact|| over all elements; 0 where both are zero."""
    exact = exact.double()
    difference = (exact - approximate.double()).norm()
    return float(difference / exact.norm().clamp(min=torch.finfo(torch.float64).tiny))
