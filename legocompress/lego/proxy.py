"""The straight-through index: a proxy N whose largest entries name the Lego filters of a slot.

Letters as in algebra.py; r = o * n slots. With M the 0/1 mask of the top k entries of a slot's N,
the slot's fragment is sum_b M[b] C[b] B[b], and the gradient passes straight through the choice:
dN = dM = C[b] <dF, B[b]> (LegoNet, Yang et al., ICML 2019, eq. 9). C[b] is the coefficient of a
chosen filter; for any other it is the one with which it would best replace the slot's weakest term,
the chosen one of smallest N. The binary form has C = 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from legocompress.lego.algebra import join_fragments
from legocompress.lego.shape import UnitShape
from legocompress.lego.unit import LegoUnit

MARGIN = 1e-5  # share of a slot's largest N by which chosen filters lead over equal ones


def start_proxy(shape: UnitShape, unit: LegoUnit) -> Tensor:
    """Compute an N (o, n, m) whose top k is the index of the unit.

    N[b] = C[b] <w, B[b]> - C[b]^2 |B[b]|^2 / 2, where w is the term that filter b would replace, or
    the term of b where b is chosen already. Up to a constant this is minus half the squared
    distance between w and its replacement. With this start, plain gradient descent moves N, to
    first order, as these distances would move if the dense weight were trained at the same rate.
    The indices of one slot must differ.
    """
    bank, slots, gains = _flatten(shape, unit)
    ones = torch.ones_like(slots, dtype=bank.dtype) if gains is None else gains
    gram = bank @ bank.T
    energy = gram.diagonal()
    held = 0.5 * ones.square() * energy[slots]
    weakest = held.argmin(1, keepdim=True)
    alike = ones.gather(1, weakest) * gram[slots.gather(1, weakest)[:, 0]]
    enter = (
        torch.ones_like(alike)
        if gains is None
        else _entering_coefficients(bank, slots, gains, weakest)
    )
    proxy = enter * alike - 0.5 * enter.square() * energy
    rivals = proxy.scatter(1, slots, -torch.inf).amax(1, keepdim=True)
    margin = MARGIN * torch.maximum(held.amax(1, keepdim=True), rivals.abs()).clamp(min=1e-20)
    return proxy.scatter(1, slots, torch.maximum(held, rivals) + margin).reshape(
        shape.n_split, shape.n_out, shape.n_lego
    )


def choose_terms(shape: UnitShape, unit: LegoUnit, proxy: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return index and coefficients, (o, n, k) each, for the top k of a proxy N that has moved.

    A filter that stays keeps its place and its coefficient. A filter that enters takes the place of
    one that leaves, with the coefficient that changes the fragment least.
    """
    bank, slots, gains = _flatten(shape, unit)
    top = proxy.reshape(shape.n_fragments, shape.n_lego).topk(shape.n_terms).indices
    same = slots[:, :, None] == top[:, None, :]
    leaves, enters = ~same.any(2), ~same.any(1)
    # As many filters leave a slot as enter it: bring both to the front and pair them.
    out = leaves.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    into = enters.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    paired = torch.where(leaves.gather(1, out), top.gather(1, into), slots.gather(1, out))
    chosen = slots.scatter(1, out, paired)
    if gains is not None:
        entered = bank[chosen]
        alike = (bank[slots] * entered).sum(2) / _positive(entered.square().sum(2))
        gains = torch.where(leaves, gains * alike, gains).reshape(unit.index.shape)
    return chosen.reshape(unit.index.shape), gains


def assemble_through(shape: UnitShape, unit: LegoUnit, proxy: Tensor) -> Tensor:
    """Build the dense filters (n, c/g, kh, kw) as `assemble` does, with gradients for N (o, n, m).

    The index of the unit must be the top k of N.
    """
    bank, slots, gains = _flatten(shape, unit)
    scores = proxy.reshape(shape.n_fragments, shape.n_lego)
    rows: Tensor = _StraightThrough.apply(bank, scores, slots, gains)  # type: ignore[no-untyped-call]
    return join_fragments(shape, rows)


class _StraightThrough(torch.autograd.Function):
    """Fragments (r, d) of a bank (m, d); the gradient for all of M is one product with the bank."""

    @staticmethod
    def forward(
        ctx: Any, bank: Tensor, scores: Tensor, slots: Tensor, gains: Tensor | None
    ) -> Tensor:
        # Copies, since the next forward pass may change the index before this backward pass.
        saved_gains = None if gains is None else gains.clone()
        ctx.save_for_backward(bank, scores.gather(1, slots), slots.clone(), saved_gains)
        rows = bank.new_zeros(len(slots), bank.shape[1])
        for t in range(slots.shape[1]):
            term = bank.index_select(0, slots[:, t])
            rows += term if gains is None else term * gains[:, t : t + 1]
        return rows

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        bank, held, slots, gains = ctx.saved_tensors
        inner = grad @ bank.T
        d_bank = torch.zeros_like(bank)
        for t in range(slots.shape[1]):
            d_bank.index_add_(0, slots[:, t], grad if gains is None else grad * gains[:, t : t + 1])
        if gains is None:
            return d_bank, inner, None, None
        enter = _entering_coefficients(bank, slots, gains, held.argmin(1, keepdim=True))
        return d_bank, inner * enter.scatter_(1, slots, gains), None, inner.gather(1, slots)


def balance_gradient(shape: UnitShape, index: Tensor) -> Tensor:
    """The balance term that the authors' released code adds to dN, per Lego filter (m,).

    It evens out how often filters are used: a filter used less than the mean number of times
    (rounded down) is pulled up by the difference, one used more (rounded up) is pushed down by it.
    """
    slots = index.flatten()
    used = slots.new_zeros(shape.n_lego).scatter_add(0, slots, torch.ones_like(slots))
    mean, rest = divmod(shape.n_slots, shape.n_lego)
    excess = (used - mean - int(rest > 0)).clamp(min=0) + (used - mean).clamp(max=0)
    return excess.to(torch.get_default_dtype())


def _entering_coefficients(bank: Tensor, slots: Tensor, gains: Tensor, weakest: Tensor) -> Tensor:
    """The best coefficient (r, m) of each filter in place of the weakest term (r, 1) of a slot."""
    gram = bank @ bank.T
    scaled = gram / _positive(gram.diagonal())
    return gains.gather(1, weakest) * scaled[slots.gather(1, weakest)[:, 0]]


def _positive(energy: Tensor) -> Tensor:
    return energy.clamp(min=torch.finfo(energy.dtype).tiny)


def _flatten(shape: UnitShape, unit: LegoUnit) -> tuple[Tensor, Tensor, Tensor | None]:
    """The bank (m, d), and index and coefficients (r, k)."""
    slots = unit.index.reshape(shape.n_fragments, shape.n_terms)
    gains = None if unit.coefficients is None else unit.coefficients.reshape(slots.shape)
    return unit.lego_filters.reshape(shape.n_lego, -1), slots, gains
