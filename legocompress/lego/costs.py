"""What a Lego unit costs: numbers, bits and multiply-accumulates."""

from __future__ import annotations

import torch
from torch import Tensor

from legocompress.lego.algebra import slot_rows
from legocompress.lego.shape import UnitShape
from legocompress.spec import LegoSpec

STORAGE_BITS: dict[str, int] = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8}
SCALE_BITS: dict[str, int] = {"int8": 16}  # for the scale of each int8 filter


def count_used_filters(shape: UnitShape, index: Tensor) -> int:
    """Count the (group, split, Lego filter) triples that at least one slot uses; at most g*o*m."""
    return int(torch.unique(slot_rows(shape, index)).numel())


def dense_params(shape: UnitShape) -> int:
    """Number of values in the dense weight."""
    return shape.n_out * shape.channels * shape.kernel[0] * shape.kernel[1]


def lego_params(shape: UnitShape, coefficients: bool) -> int:
    """Number of trainable values of the Lego form: bank and coefficients, without the index."""
    return shape.n_filter_values + (shape.n_slots if coefficients else 0)


def lego_bits(
    shape: UnitShape, filter_bits: int, coefficient_bits: int, scale_bits: int = 0
) -> int:
    """Ideal size in bits of bank, index and coefficients.

    `coefficient_bits` is 0 for the binary form. `scale_bits` is the size of the scale that each
    int8 filter has beside its values.
    """
    bank = shape.n_filter_values * filter_bits + shape.n_lego * scale_bits
    return bank + shape.n_slots * (shape.index_bits + coefficient_bits)


def dense_macs(shape: UnitShape, pixels: int) -> int:
    """Multiply-accumulates of the dense conv for this many output pixels."""
    return dense_params(shape) * pixels


def lego_macs(shape: UnitShape, pixels: int, used: float = 1.0) -> int:
    """Multiply-accumulates of split, transform and merge for this many output pixels.

    Per pixel the transform takes m*c*kh*kw and the merge n*o*k (LegoNet, eq. 17, generalised to g
    groups, k terms and padded splits). `used` is the share of the filters that the transform
    computes: a split can skip the filters that none of its slots uses.
    """
    transform = round(used * shape.n_filter_values * shape.groups * shape.n_split)
    return (transform + shape.n_slots) * pixels


def bank_bits(shape: UnitShape, spec: LegoSpec) -> int:
    """Ideal bits of the bank of a Lego unit under the storage dtype of `spec`."""
    values = shape.n_filter_values * STORAGE_BITS[spec.dtype]
    return values + shape.n_lego * SCALE_BITS.get(spec.dtype, 0)


def unit_bits(shape: UnitShape, spec: LegoSpec) -> int:
    """Ideal bits of one Lego unit under the storage dtypes of `spec`."""
    coefficient_bits = STORAGE_BITS[spec.coefficients_dtype] if spec.coefficients else 0
    scale_bits = SCALE_BITS.get(spec.dtype, 0)
    return lego_bits(shape, STORAGE_BITS[spec.dtype], coefficient_bits, scale_bits)
