"""The straight-through index: a proxy N whose largest entries name the Lego filters of a slot.

Letters as in unit.py; r = o * n slots. With M the 0/1 mask of the top k entries of a slot's N, the
slot's fragment is sum_b M[b] C[b] B[b], and the gradient passes straight through the choice:
dN = dM = C[b] <dF, B[b]> (LegoNet, Yang et al., ICML 2019, eq. 9). C[b] is the coefficient of a
chosen filter; for any other it is the one with which it would best replace the slot's weakest term,
the chosen one of smallest N. The binary form has C = 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from legocompress.lego.algebra import stack
from legocompress.lego.shape import UnitShape

MARGIN = 1e-5  # of a slot's largest N: what keeps a chosen filter ahead of its own double


def start_proxy(
    shape: UnitShape, lego_filters: Tensor, index: Tensor, coefficients: Tensor | None
) -> Tensor:
    """The N (o, n, m) whose top k are `index`, from what each filter would bring to a slot.

    N[b] = C[b] <w, B[b]> - C[b]^2 |B[b]|^2 / 2, where w is the term that b would replace, itself if
    it is chosen: up to a constant, minus half the squared distance of w and its replacement. Plain
    gradient descent at some rate then moves N as these distances would move, to first order, if the
    dense weight were trained at that rate.

    Args:
        shape: sizes of the unit.
        lego_filters: (m, q, kh, kw).
        index: (o, n, k) integers in [0, m), different ones in a slot.
        coefficients: (o, n, k), or None for all ones.
    """
    bank, slots, gains = _flat(shape, lego_filters, index, coefficients)
    ones = torch.ones_like(slots, dtype=bank.dtype) if gains is None else gains
    gram = bank @ bank.T
    energy = gram.diagonal()
    own = 0.5 * ones.square() * energy[slots]
    weakest = own.argmin(1, keepdim=True)
    alike = ones.gather(1, weakest) * gram[slots.gather(1, weakest)[:, 0]]
    enter = torch.ones_like(alike) if gains is None else _entering(bank, slots, gains, weakest)
    proxy = enter * alike - 0.5 * enter.square() * energy
    rivals = proxy.scatter(1, slots, -torch.inf).amax(1, keepdim=True)
    margin = MARGIN * torch.maximum(own.amax(1, keepdim=True), rivals.abs()).clamp(min=1e-20)
    return proxy.scatter(1, slots, torch.maximum(own, rivals) + margin).reshape(
        shape.n_split, shape.n_out, shape.n_lego
    )


def choose(
    shape: UnitShape,
    lego_filters: Tensor,
    proxy: Tensor,
    index: Tensor,
    coefficients: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The index and the coefficients after N has moved: the top k, as (o, n, k) each.

    A term that stays keeps its place and its coefficient. A filter that enters takes the place of
    one that leaves, with the coefficient that changes the fragment least.
    """
    bank, slots, gains = _flat(shape, lego_filters, index, coefficients)
    top = proxy.reshape(shape.n_fragments, shape.n_lego).topk(shape.n_terms).indices
    same = slots[:, :, None] == top[:, None, :]
    leaves, enters = ~same.any(2), ~same.any(1)
    # As many leave a slot as enter it; both are brought to the front, and paired.
    out = leaves.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    into = enters.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    paired = torch.where(leaves.gather(1, out), top.gather(1, into), slots.gather(1, out))
    chosen = slots.scatter(1, out, paired)
    if gains is not None:
        entered = bank[chosen]
        alike = (bank[slots] * entered).sum(2) / _positive(entered.square().sum(2))
        gains = torch.where(leaves, gains * alike, gains).reshape(index.shape)
    return chosen.reshape(index.shape), gains


def assemble_through(
    shape: UnitShape,
    lego_filters: Tensor,
    proxy: Tensor,
    index: Tensor,
    coefficients: Tensor | None,
) -> Tensor:
    """Build the dense filters (n, c/g, kh, kw) as `unit.assemble` does, and let N learn.

    Args:
        shape: sizes of the unit.
        lego_filters: (m, q, kh, kw).
        proxy: N, (o, n, m).
        index: (o, n, k), the top k of N.
        coefficients: (o, n, k), or None for all ones.
    """
    bank, slots, gains = _flat(shape, lego_filters, index, coefficients)
    scores = proxy.reshape(shape.n_fragments, shape.n_lego)
    rows: Tensor = _Through.apply(bank, scores, slots, gains)  # type: ignore[no-untyped-call]
    return stack(shape, rows)


class _Through(torch.autograd.Function):
    """Fragments (r, d) of a bank (m, d); one product with the bank gives all of dM."""

    @staticmethod
    def forward(
        ctx: Any, bank: Tensor, scores: Tensor, slots: Tensor, gains: Tensor | None
    ) -> Tensor:
        # Copies, since the next forward pass may choose anew before this one's backward.
        kept = None if gains is None else gains.clone()
        ctx.save_for_backward(bank, scores.gather(1, slots), slots.clone(), kept)
        rows = bank.new_zeros(len(slots), bank.shape[1])
        for t in range(slots.shape[1]):
            term = bank.index_select(0, slots[:, t])
            rows += term if gains is None else term * gains[:, t : t + 1]
        return rows

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        bank, own, slots, gains = ctx.saved_tensors
        inner = grad @ bank.T
        d_bank = torch.zeros_like(bank)
        for t in range(slots.shape[1]):
            d_bank.index_add_(0, slots[:, t], grad if gains is None else grad * gains[:, t : t + 1])
        if gains is None:
            return d_bank, inner, None, None
        enter = _entering(bank, slots, gains, own.argmin(1, keepdim=True))
        return d_bank, inner * enter.scatter_(1, slots, gains), None, inner.gather(1, slots)


def balance_gradient(shape: UnitShape, index: Tensor) -> Tensor:
    """What the authors' released code adds to dN, per Lego filter (m,): evens out their use.

    A filter used less than the mean number of times (rounded down) is pulled up by what it lacks,
    one used more (rounded up) is pushed down by its excess.
    """
    slots = index.flatten()
    used = slots.new_zeros(shape.n_lego).scatter_add(0, slots, torch.ones_like(slots))
    mean, rest = divmod(shape.n_slots, shape.n_lego)
    excess = (used - mean - int(rest > 0)).clamp(min=0) + (used - mean).clamp(max=0)
    return excess.to(torch.get_default_dtype())


def _entering(bank: Tensor, slots: Tensor, gains: Tensor, weakest: Tensor) -> Tensor:
    """Coefficients (r, m) with which each filter would best replace the weakest term (r, 1)."""
    gram = bank @ bank.T
    scaled = gram / _positive(gram.diagonal())
    return gains.gather(1, weakest) * scaled[slots.gather(1, weakest)[:, 0]]


def _positive(energy: Tensor) -> Tensor:
    return energy.clamp(min=torch.finfo(energy.dtype).tiny)


def _flat(
    shape: UnitShape, lego_filters: Tensor, index: Tensor, coefficients: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    slots = index.reshape(shape.n_fragments, shape.n_terms)
    gains = None if coefficients is None else coefficients.reshape(slots.shape)
    return lego_filters.reshape(shape.n_lego, -1), slots, gains
