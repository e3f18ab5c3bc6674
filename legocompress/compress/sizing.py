"""Sizes of the Lego unit that a layer gets, and whether it pays."""

from __future__ import annotations

from collections.abc import Sequence

from legocompress.compress.plan_types import LayerPlan
from legocompress.errors import SpecError
from legocompress.lego.costs import unit_bits
from legocompress.lego.shape import UnitShape
from legocompress.spec import LegoSpec


def choose_shape(row: LayerPlan, spec: LegoSpec) -> UnitShape:
    """Choose the sizes of the unit for a layer.

    Where o does not divide the channels, either the last fragment is padded or o is smaller,
    whichever takes fewer bits.
    """
    n_out, channels = row.weight_shape[:2]
    kernel = row.weight_shape[2:] or (1, 1)

    def shape(n_split: int) -> UnitShape:
        n_lego = min(max(1, round(spec.m * n_out)), n_split * n_out)
        # A bank that holds every fragment is exact with one term.
        n_terms = 1 if n_lego == n_split * n_out else min(spec.k, n_lego)
        return UnitShape(
            n_out, channels, (kernel[0], kernel[1]), row.groups, n_lego, n_split, n_terms
        )

    if channels % spec.o == 0:
        return shape(spec.o)
    # A split whose last fragment were all padding would equal a smaller split.
    splits = [
        o for o in range(1, min(spec.o, channels) + 1) if (o - 1) * -(-channels // o) < channels
    ]
    return min((shape(o) for o in splits), key=lambda s: (unit_bits(s, spec), -s.n_split))


def explain_no_gain(shape: UnitShape, spec: LegoSpec, dense_bits: int) -> str | None:
    """Say why a unit of these sizes does not pay; None if it does."""
    if spec.allow_expansion:
        return None
    if shape.n_lego < shape.n_split:
        return f"too small: {shape.n_lego} Lego filters for {shape.n_split} splits"
    bits = unit_bits(shape, spec)
    if bits > dense_bits:
        return f"no saving: {bits:,} bits as Lego unit, {dense_bits:,} dense"
    return None


def check_splits(spec: LegoSpec, rows: Sequence[LayerPlan]) -> None:
    """Raise SpecError if `o` divides the input channels of none of the layers to convert."""
    converted = [r for r in rows if r.shape is not None and r.spec is not None]
    if converted and all(r.shape.channels % r.spec.o for r in converted if r.shape and r.spec):
        channels = sorted({r.shape.channels for r in converted if r.shape})
        good = [o for o in range(1, max(channels) + 1) if any(c % o == 0 for c in channels)][:8]
        raise SpecError(
            f"o={spec.o} divides the input channels of no layer (they are "
            f"{', '.join(map(str, channels[:8]))}{', ...' if len(channels) > 8 else ''}); "
            f"values that divide some: {', '.join(map(str, good))}"
        )
