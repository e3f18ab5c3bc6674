"""Fit one Lego unit to the second moments of its layer: bank, index and coefficients by turns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from legocompress.calibrate.moments import TINY, Moments
from legocompress.cluster.clustering import cluster
from legocompress.cluster.pursuit import pursue
from legocompress.cluster.state import segment_sum, segments
from legocompress.lego.shape import UnitShape

ROUNDS = 30
CONJUGATE_STEPS = 8
IMPROVEMENT = 1e-3


@dataclass(frozen=True)
class Unit:
    """A Lego unit's values: bank (m, d), index (o, n, k) and gains (o, n, k), None if binary."""

    shape: UnitShape
    bank: Tensor
    index: Tensor
    gains: Tensor | None

    def filters(self, bank: Tensor | None = None) -> Tensor:
        """The filters (g, n/g, o * d), padded channels included, of this bank or another."""
        n = self.shape.n_out
        table = self.bank if bank is None else bank
        terms = table[self.index]
        if self.gains is not None:
            terms = terms * self.gains[..., None]
        return terms.sum(2).transpose(0, 1).reshape(self.shape.groups, n // self.shape.groups, -1)


def fit_unit(unit: Unit, seen: Moments, held_out: Moments, seed: int) -> Unit:
    """The unit of the same form that fits `seen` best, as far as `held_out` agrees.

    Starts by clustering the best unconstrained filters in the mean metric of all splits; then each
    round chooses the slots anew, split after split, by matching pursuit in the exact metric, and
    lowers the error over the bank by conjugate gradients. No step raises the error on `seen`; the
    round of least error on `held_out` is returned, and rounds end where neither falls.
    """
    best, least = unit, held_out.error(unit.filters())
    unit = _restart(unit, seen, seed)
    previous = torch.inf
    for _ in range(ROUNDS):
        unit = _improve_bank(_improve_slots(unit, seen), seen)
        error = held_out.error(unit.filters())
        if error < least:
            best, least = unit, error
        if not error < previous * (1 - IMPROVEMENT):
            break
        previous = error
    return best


def _restart(unit: Unit, seen: Moments, seed: int) -> Unit:
    o, n, k = unit.index.shape
    rows = seen.solve().reshape(n, o, -1).transpose(0, 1).reshape(o * n, -1).double()
    root = torch.linalg.cholesky(seen.mean_square(o))
    factors = cluster((rows @ root).float(), len(unit.bank), k, unit.gains is not None, seed)
    bank = factors.lego_filters.double()
    bank = torch.linalg.solve_triangular(root, bank, upper=False, left=False)
    gains = None if factors.coefficients is None else factors.coefficients.reshape(o, n, k)
    return replace(unit, bank=bank.float(), index=factors.index.reshape(o, n, k), gains=gains)


def _improve_slots(unit: Unit, seen: Moments) -> Unit:
    """Choose every slot's Lego filters and coefficients anew, all outputs of a split at once."""
    o, n, _ = unit.index.shape
    g, bank = unit.shape.groups, unit.bank
    index = unit.index.clone()
    gains = bank.new_ones(index.shape) if unit.gains is None else unit.gains.clone()
    filters = unit.filters().reshape(g, n // g, o, -1)
    rest = seen.cross - seen.times(filters.flatten(2))
    for i in range(o):
        square, old = seen.split_square(i, o), filters[:, :, i]
        inner = (rest.reshape(filters.shape)[:, :, i] + old @ square) @ bank.T
        gram = bank @ square @ bank.T
        for group, rows in enumerate(torch.arange(n).tensor_split(g)):
            index[i, rows], gains[i, rows] = _best_slots(
                inner[group], gram[group], index[i, rows], gains[i, rows], unit.gains is not None
            )
        new = (bank[index[i]] * gains[i][..., None]).sum(1).reshape(old.shape)
        rest = rest - seen.split_times(new - old, i, o)
    return replace(unit, index=index, gains=None if unit.gains is None else gains)


def _best_slots(
    inner: Tensor, gram: Tensor, index: Tensor, gains: Tensor, signed: bool
) -> tuple[Tensor, Tensor]:
    """Pick k of m filters for every row, by products (rows, m) with it and (m, m) among them."""
    scale = gram.diagonal().clamp(min=TINY).rsqrt() if signed else torch.ones_like(gram[0])
    picks, new = pursue(inner * scale, gram * scale[:, None] * scale, index.shape[1], signed)
    new = new * scale[picks]
    worse = _gain(inner, gram, picks, new) <= _gain(inner, gram, index, gains)
    return torch.where(worse[:, None], index, picks), torch.where(worse[:, None], gains, new)


def _gain(inner: Tensor, gram: Tensor, index: Tensor, gains: Tensor) -> Tensor:
    """By how much the picks lower the squared error of each row."""
    among = gram[index[:, :, None], index[:, None, :]]
    own = (among * gains[:, :, None] * gains[:, None, :]).sum((1, 2))
    return 2 * (inner.gather(1, index) * gains).sum(1) - own


def _improve_bank(unit: Unit, seen: Moments) -> Unit:
    """Lower the error over the bank by conjugate gradients.

    A Lego filter's own block of the Hessian is the sum of its squared coefficients times the metric
    of the splits that use it; with the mean metric in its place, that is the preconditioner.
    """
    o, n, k = unit.index.shape
    m, d = unit.bank.shape
    slots = unit.index.flatten()
    gains = slots.new_ones(len(slots)).to(unit.bank) if unit.gains is None else unit.gains.flatten()
    members, starts, _ = segments(slots, m)
    squares = unit.bank.new_zeros(m).index_put_((slots,), gains.square(), accumulate=True)
    squares = torch.where(squares > 0, squares, 1.0)[:, None]
    root = torch.linalg.cholesky(seen.mean_square(o))

    def to_bank(filters: Tensor) -> Tensor:
        rows = filters.reshape(n, o, d).transpose(0, 1).reshape(o * n, d)
        return segment_sum(rows, members // k, starts, gains[members])

    def precondition(rows: Tensor) -> Tensor:
        return torch.cholesky_solve((rows / squares).double().T, root).T.to(rows.dtype)

    bank = unit.bank
    residual = to_bank(seen.cross - seen.times(unit.filters()))
    direction = solved = precondition(residual)
    energy = (residual * solved).sum()
    for _ in range(CONJUGATE_STEPS):
        image = to_bank(seen.times(unit.filters(direction)))
        curvature = (direction * image).sum()
        if not (curvature > 0 and energy > 0):
            break
        bank = bank + energy / curvature * direction
        residual = residual - energy / curvature * image
        solved = precondition(residual)
        previous, energy = energy, (residual * solved).sum()
        direction = solved + energy / previous * direction
    return replace(unit, bank=bank)
