"""Fit one Lego unit to the second moments of its layer: bank, index and coefficients by turns.

Here the filters of a unit are a bank (m, d), with d = q * kh * kw.
"""

from __future__ import annotations

import torch
from torch import Tensor

from legocompress.calibrate.moments import TINY, Moments
from legocompress.cluster.clustering import cluster
from legocompress.cluster.pursuit import pursue
from legocompress.cluster.state import segment_sum, segments
from legocompress.lego.shape import UnitShape
from legocompress.lego.unit import LegoUnit

ROUNDS = 30
CONJUGATE_STEPS = 8
IMPROVEMENT = 1e-3


def padded_filters(shape: UnitShape, unit: LegoUnit, bank: Tensor | None = None) -> Tensor:
    """The filters (g, n/g, o * d), padded channels included, of the unit's bank or of another."""
    terms = (unit.lego_filters if bank is None else bank)[unit.index]
    if unit.coefficients is not None:
        terms = terms * unit.coefficients[..., None]
    per_group = shape.n_out // shape.groups
    return terms.sum(2).transpose(0, 1).reshape(shape.groups, per_group, -1)


def fit_unit(
    shape: UnitShape, unit: LegoUnit, moments: Moments, held_out: Moments, seed: int
) -> LegoUnit:
    """Fit a unit of the same sizes to `moments`, and return the round that is best on `held_out`.

    It starts by clustering the best unconstrained filters in the mean metric of all splits. Then
    each round chooses the slots again, split by split, by matching pursuit in the exact metric, and
    lowers the error over the bank by conjugate gradients. No step raises the error on `moments`.
    The rounds end when the error on `held_out` no longer falls.
    """
    best, least = unit, held_out.error(padded_filters(shape, unit))
    unit = _restart(unit, moments, seed)
    previous = torch.inf
    for _ in range(ROUNDS):
        unit = improve_bank(shape, improve_slots(shape, unit, moments), moments)
        error = held_out.error(padded_filters(shape, unit))
        if error < least:
            best, least = unit, error
        if not error < previous * (1 - IMPROVEMENT):
            break
        previous = error
    return best


def fit_slots(shape: UnitShape, unit: LegoUnit, moments: Moments, held_out: Moments) -> LegoUnit:
    """Fit index and coefficients alone, for a bank that other layers use, too.

    Rounds of `improve_slots` end when the error on `held_out` no longer falls; the best round is
    returned.
    """
    best, least = unit, held_out.error(padded_filters(shape, unit))
    for _ in range(ROUNDS):
        unit = improve_slots(shape, unit, moments)
        error = held_out.error(padded_filters(shape, unit))
        if not error < least:
            break
        done = error > least * (1 - IMPROVEMENT)
        best, least = unit, error
        if done:
            break
    return best


def _restart(unit: LegoUnit, moments: Moments, seed: int) -> LegoUnit:
    o, n, k = unit.index.shape
    rows = moments.solve().reshape(n, o, -1).transpose(0, 1).reshape(o * n, -1).double()
    root = torch.linalg.cholesky(moments.mean_square(o))
    factors = cluster(
        (rows @ root).float(), len(unit.lego_filters), k, unit.coefficients is not None, seed
    )
    bank = factors.lego_filters.double()
    bank = torch.linalg.solve_triangular(root, bank, upper=False, left=False)
    gains = None if factors.coefficients is None else factors.coefficients.reshape(o, n, k)
    return LegoUnit(bank.float(), factors.index.reshape(o, n, k), gains)


def improve_slots(shape: UnitShape, unit: LegoUnit, moments: Moments) -> LegoUnit:
    """Choose Lego filters and coefficients of every slot again, all outputs of a split at once."""
    o, n, _ = unit.index.shape
    g, bank = shape.groups, unit.lego_filters
    index, signed = unit.index.clone(), unit.coefficients is not None
    gains = bank.new_ones(index.shape) if unit.coefficients is None else unit.coefficients.clone()
    filters = padded_filters(shape, unit).reshape(g, n // g, o, -1)
    rest = moments.cross - moments.times(filters.flatten(2))
    for i in range(o):
        square, old = moments.split_square(i, o), filters[:, :, i]
        inner = (rest.reshape(filters.shape)[:, :, i] + old @ square) @ bank.T
        gram = bank @ square @ bank.T
        for group, rows in enumerate(torch.arange(n).tensor_split(g)):
            index[i, rows], gains[i, rows] = _best_slots(
                inner[group],
                gram[group],
                index[i, rows],
                gains[i, rows],
                unit.coefficients is not None,
            )
        new = (bank[index[i]] * gains[i][..., None]).sum(1).reshape(old.shape)
        rest = rest - moments.split_times(new - old, i, o)
    return LegoUnit(bank, index, gains if signed else None)


def _best_slots(
    inner: Tensor, gram: Tensor, index: Tensor, gains: Tensor, signed: bool
) -> tuple[Tensor, Tensor]:
    """Pick k of m filters for every row, from products (rows, m) with the row and a Gram (m, m)."""
    scale = gram.diagonal().clamp(min=TINY).rsqrt() if signed else torch.ones_like(gram[0])
    picks, new = pursue(inner * scale, gram * scale[:, None] * scale, index.shape[1], signed)
    new = new * scale[picks]
    worse = _gain(inner, gram, picks, new) <= _gain(inner, gram, index, gains)
    return torch.where(worse[:, None], index, picks), torch.where(worse[:, None], gains, new)


def _gain(inner: Tensor, gram: Tensor, index: Tensor, gains: Tensor) -> Tensor:
    """How much the picks lower the squared error of each row."""
    among = gram[index[:, :, None], index[:, None, :]]
    energy = (among * gains[:, :, None] * gains[:, None, :]).sum((1, 2))
    return 2 * (inner.gather(1, index) * gains).sum(1) - energy


def improve_bank(shape: UnitShape, unit: LegoUnit, moments: Moments) -> LegoUnit:
    """Lower the error over the bank by conjugate gradients.

    The block of a Lego filter in the Hessian is the sum of its squared coefficients times the
    metric of the splits that use it. The preconditioner is this block with the mean metric of all
    splits.
    """
    o, n, k = unit.index.shape
    m, d = unit.lego_filters.shape
    slots = unit.index.flatten()
    gains = slots.new_ones(len(slots)).to(unit.lego_filters)
    if unit.coefficients is not None:
        gains = unit.coefficients.flatten()
    members, starts, _ = segments(slots, m)
    squares = unit.lego_filters.new_zeros(m).index_put_((slots,), gains.square(), accumulate=True)
    squares = torch.where(squares > 0, squares, 1.0)[:, None]
    root = torch.linalg.cholesky(moments.mean_square(o))

    def to_bank(filters: Tensor) -> Tensor:
        rows = filters.reshape(n, o, d).transpose(0, 1).reshape(o * n, d)
        return segment_sum(rows, members // k, starts, gains[members])

    def precondition(rows: Tensor) -> Tensor:
        return torch.cholesky_solve((rows / squares).double().T, root).T.to(rows.dtype)

    bank = unit.lego_filters
    residual = to_bank(moments.cross - moments.times(padded_filters(shape, unit)))
    direction = solved = precondition(residual)
    energy = (residual * solved).sum()
    for _ in range(CONJUGATE_STEPS):
        image = to_bank(moments.times(padded_filters(shape, unit, direction)))
        curvature = (direction * image).sum()
        if not (curvature > 0 and energy > 0):
            break
        bank = bank + energy / curvature * direction
        residual = residual - energy / curvature * image
        solved = precondition(residual)
        previous, energy = energy, (residual * solved).sum()
        direction = solved + energy / previous * direction
    return unit._replace(lego_filters=bank)
