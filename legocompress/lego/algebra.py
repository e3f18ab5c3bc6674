"""The math of one Lego unit, as pure functions of tensors.

Letters of the shapes: n outputs, c input channels, g groups, o splits, m Lego filters, k terms per
slot, q = ceil(c / g / o) channels per fragment. Sizes come from a UnitShape of Python integers and
are never read from tensors, so that tracing and export see constants.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from legocompress.lego.shape import UnitShape
from legocompress.lego.unit import LegoUnit


def cut_fragments(weight: Tensor, n_split: int) -> Tensor:
    """Cut the filters (n, c/g, kh, kw) into fragments (o, n, q, kh, kw), the last zero-padded."""
    n_out, channels, kh, kw = weight.shape
    width = -(-channels // n_split)
    padded = F.pad(weight, (0, 0, 0, 0, 0, n_split * width - channels))
    return padded.reshape(n_out, n_split, width, kh, kw).transpose(0, 1)


def assemble(shape: UnitShape, unit: LegoUnit) -> Tensor:
    """Build the dense filters (n, c/g, kh, kw) that a Lego unit stands for.

    F[j, fragment i] = sum_t coefficients[i, j, t] * lego_filters[index[i, j, t]]; with k = 1 this
    is eq. 3 of LegoNet (Yang et al., ICML 2019).
    """
    bank = unit.lego_filters.reshape(shape.n_lego, -1)
    slots = unit.index.reshape(shape.n_fragments, shape.n_terms)
    gains = None
    if unit.coefficients is not None:
        gains = unit.coefficients.reshape(shape.n_fragments, shape.n_terms)
    total = None
    for t in range(shape.n_terms):
        term = bank.index_select(0, slots[:, t])
        if gains is not None:
            term = term * gains[:, t : t + 1]
        total = term if total is None else total + term
    assert total is not None
    return join_fragments(shape, total)


def join_fragments(shape: UnitShape, rows: Tensor) -> Tensor:
    """Turn fragments (o*n, q*kh*kw) into dense filters (n, c/g, kh, kw), padding dropped."""
    kh, kw = shape.kernel
    split = rows.reshape(shape.n_split, shape.n_out, shape.width, kh, kw)
    filters = split.transpose(0, 1).reshape(shape.n_out, shape.n_split * shape.width, kh, kw)
    return filters[:, : shape.channels].contiguous()


def transform(
    shape: UnitShape,
    lego_filters: Tensor,
    x: Tensor,
    stride: tuple[int, ...],
    padding: str | tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """Convolve every split of (N, c, H, W) with all Lego filters: (N*g*o, m', H', W')."""
    height, width = x.shape[2], x.shape[3]
    missing = shape.n_split * shape.width - shape.channels
    if missing:
        x = x.reshape(-1, shape.channels, height, width)
        x = F.pad(x, (0, 0, 0, 0, 0, missing))
    parts = x.reshape(-1, shape.width, height, width)
    return F.conv2d(parts, lego_filters, None, stride, padding, dilation)


def split_transform_merge(
    shape: UnitShape,
    unit: LegoUnit,
    x: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, ...] = (1, 1),
    padding: str | tuple[int, ...] = (0, 0),
    dilation: tuple[int, ...] = (1, 1),
) -> Tensor:
    """Convolve (N, c, H, W) with a Lego unit without building its dense filters: (N, n, H', W').

    Y[j] = sum_i sum_t coefficients[i, j, t] * conv(X_i, lego_filters)[index[i, j, t]] + bias[j]
    (LegoNet, eqs. 4 to 6). It uses plain operators only: one conv with groups = 1, in which every
    split of every group is one image of the batch, then a gather, a product and a sum per term.

    Args:
        shape: sizes of the unit.
        unit: its filters, index and coefficients.
        x: (N, c, H, W).
        bias: (n,) or None.
        stride: of the conv.
        padding: of the conv, zeros; also 'same' and 'valid'.
        dilation: of the conv.
    """
    z = transform(shape, unit.lego_filters, x, stride, padding, dilation)
    n_parts = shape.groups * shape.n_split
    z = z.reshape(-1, n_parts * shape.n_lego, z.shape[2], z.shape[3])
    rows = slot_rows(shape, unit.index)
    y = None
    for i in range(shape.n_split):
        for t in range(shape.n_terms):
            term = z.index_select(1, rows[i, :, t])
            if unit.coefficients is not None:
                term = term * unit.coefficients[i, :, t].reshape(1, -1, 1, 1)
            y = term if y is None else y + term
    assert y is not None
    return y if bias is None else y + bias.reshape(1, -1, 1, 1)


def build_slot_table(shape: UnitShape, unit: LegoUnit, batch: int) -> tuple[Tensor, Tensor | None]:
    """Build the table for `merge_by_table`: which rows of the intermediate map each output sums.

    The map is (batch*g*o*m, H'*W'). Returns two tensors (batch*n, o*k): row numbers, and weights,
    which are None in the binary form.
    """
    rows = slot_rows(shape, unit.index).permute(1, 0, 2).reshape(1, shape.n_out, -1)
    image = torch.arange(batch, device=unit.index.device) * (
        shape.groups * shape.n_split * shape.n_lego
    )
    bags = (rows + image[:, None, None]).reshape(batch * shape.n_out, -1)
    if unit.coefficients is None:
        return bags, None
    gains = unit.coefficients.permute(1, 0, 2).reshape(shape.n_out, -1)
    return bags, gains.repeat(batch, 1)


def merge_by_table(
    shape: UnitShape, z: Tensor, table: tuple[Tensor, Tensor | None], bias: Tensor | None
) -> Tensor:
    """Sum the map of `transform` into the outputs (N, n, H', W') with one embedding_bag.

    `table` is what `build_slot_table` returns.
    """
    bags, gains = table
    z = z.contiguous()
    y = F.embedding_bag(
        bags, z.reshape(-1, z.shape[2] * z.shape[3]), mode="sum", per_sample_weights=gains
    )
    y = y.reshape(-1, shape.n_out, z.shape[2], z.shape[3])
    return y if bias is None else y.add_(bias.reshape(1, -1, 1, 1))


def slot_rows(shape: UnitShape, index: Tensor) -> Tensor:
    """Channels (o, n, k) of the intermediate map (N, g*o*m, H', W') that the slots use."""
    group = torch.arange(shape.groups, device=index.device)
    split = torch.arange(shape.n_split, device=index.device)
    part = group[None, :] * shape.n_split + split[:, None]
    # One offset per split and group, not per slot: an exported graph stores them.
    by_group = index.reshape(shape.n_split, shape.groups, -1)
    return (by_group + part[:, :, None] * shape.n_lego).reshape(index.shape)
