"""Choose which planned layers share one bank of Lego filters, and the sizes of their units.

A bank belongs to fragments of one shape. Layers whose fragments differ in width are cut to the
narrowest width among them, where it divides their channels; kernels are never cut.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from legocompress.compress.plan_types import LayerPlan
from legocompress.compress.sizing import choose_shape, explain_no_gain
from legocompress.lego.shape import UnitShape


def share_banks(
    rows: Sequence[LayerPlan], layers: Mapping[str, nn.Module]
) -> tuple[LayerPlan, ...]:
    """Give the rows that ask for it a shared bank; return all rows in the same order.

    A group that would not take fewer bits than its dense weights stays dense. A layer that shares
    its bank with no other gets the unit that it would have had alone.

    Args:
        rows: with shape and spec where the layer is to be converted.
        layers: the layers by name.
    """
    results = {row.name: row for row in rows}
    for members in group_members(rows, layers):
        for group in _cut_to_one_width(members):
            results.update((row.name, row) for row in _size_group(group))
    return tuple(results[row.name] for row in rows)


def group_members(
    rows: Iterable[LayerPlan], layers: Mapping[str, nn.Module]
) -> list[list[LayerPlan]]:
    """Group the rows that may share a bank, once their fragments have one width.

    The members of a group agree in scope, kernel, settings of storage, and in dtype, device and
    requires_grad of their weights, since the bank is one parameter. The scope is the network, or
    the output resolution. A layer that did not run has no resolution, so it forms a group alone.
    """
    groups: dict[Hashable, list[LayerPlan]] = defaultdict(list)
    for row in rows:
        if row.shape is None or row.spec is None or row.spec.share == "layer":
            continue
        scope: Hashable = "network"
        if row.spec.share == "stage":
            scope = row.name if row.pixels is None else row.pixels
        weight = layers[row.name]._parameters["weight"]
        assert weight is not None
        storage = (row.spec.coefficients, row.spec.dtype, row.spec.coefficients_dtype)
        tensor = (weight.dtype, weight.device, weight.requires_grad)
        groups[scope, row.shape.kernel, storage, tensor].append(row)
    return list(groups.values())


def cut_to_width(shape: UnitShape, width: int) -> UnitShape | None:
    """The unit of the same layer with fragments of `width` channels; None if there is none."""
    cut = replace(shape, n_split=-(-shape.channels // width))
    return cut if cut.width == width else None


def size_bank(rows: Sequence[LayerPlan], shapes: Sequence[UnitShape]) -> int:
    """Number of filters of a shared bank: those that the layers would have had in banks apart."""
    total = sum(row.spec.m * shape.n_out for row, shape in zip(rows, shapes, strict=True)
                if row.spec is not None)  # fmt: skip
    return min(max(1, round(total)), sum(shape.n_fragments for shape in shapes))


def _cut_to_one_width(rows: Sequence[LayerPlan]) -> list[list[LayerPlan]]:
    """Cut rows to the least width among them; those that it does not fit are grouped apart."""
    least = min(row.shape.width for row in rows if row.shape is not None)
    by_width: dict[int, list[LayerPlan]] = defaultdict(list)
    for row in rows:
        assert row.shape is not None
        shape = cut_to_width(row.shape, least) or row.shape
        by_width[shape.width].append(replace(row, shape=shape))
    return list(by_width.values())


def _size_group(rows: Sequence[LayerPlan]) -> list[LayerPlan]:
    if len(rows) == 1:
        row = rows[0]
        assert row.spec is not None
        shape = choose_shape(row, row.spec)
        reason = explain_no_gain(shape, row.spec, row.dense_bits)
        return [_with_shape(row, shape, reason)]
    shapes = [row.shape for row in rows if row.shape is not None]
    n_lego = size_bank(rows, shapes)
    is_exact = n_lego == sum(shape.n_fragments for shape in shapes)
    sized = []
    for row, shape in zip(rows, shapes, strict=True):
        assert row.spec is not None
        n_terms = 1 if is_exact else min(row.spec.k, n_lego)
        shape = replace(shape, n_lego=n_lego, n_terms=n_terms)
        sized.append(replace(row, shape=shape, bank=rows[0].name))
    bits, dense_bits = sum(row.bits for row in sized), sum(row.dense_bits for row in sized)
    if bits <= dense_bits or any(row.spec and row.spec.allow_expansion for row in sized):
        return sized
    reason = f"no saving: {bits:,} bits as {len(sized)} units of one bank, {dense_bits:,} dense"
    return [_with_shape(replace(row, bank=None), None, reason) for row in sized]


def _with_shape(row: LayerPlan, shape: UnitShape | None, reason: str | None) -> LayerPlan:
    if reason is None:
        return replace(row, shape=shape)
    return replace(row, reason=reason, shape=None, spec=None)
