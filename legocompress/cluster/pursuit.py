"""Several terms a fragment: matching pursuit over the bank, alternating with least squares."""

from dataclasses import replace

import torch
from torch import Tensor

from legocompress.cluster.lloyd import initialize_bank, reseed, run_lloyd
from legocompress.cluster.state import (
    TINY,
    WIDE_CHUNK,
    State,
    assemble,
    normalize_rows,
    one_thread,
    segment_sum,
    segments,
)

LEARN_ROUNDS = 20
PLAIN_SWEEPS = 2
LEARN_IMPROVEMENT = 1e-3


def _pursue_signed(inner: Tensor, gram: Tensor, n_terms: int) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit on inner products (rows, n_lego) and the bank's Gram matrix.

    The orthonormal basis of the picked filters is kept as its inner products with the whole bank:
    a term costs rows x n_lego x terms, and a filter that depends on the others gets coefficient 0.
    """
    rows = torch.arange(len(inner), device=inner.device)
    index = torch.empty(len(inner), n_terms, dtype=torch.long, device=inner.device)
    triangle = torch.eye(n_terms).to(inner).repeat(len(inner), 1, 1)
    along = inner.new_zeros(len(inner), n_terms)
    basis: list[Tensor] = []
    for term in range(n_terms):
        pick = inner.abs().scatter_(1, index[:, :term], -1.0).argmax(1)
        index[:, term] = pick
        fresh = gram.index_select(0, pick)
        for earlier, old in enumerate(basis):
            shared = old[rows, pick]
            triangle[:, term, earlier] = shared
            fresh.addcmul_(old, shared[:, None], value=-1)
        square = fresh[rows, pick]
        usable = square > 1e-6
        scale = torch.where(usable, square.clamp(min=1e-6).rsqrt(), 0.0)
        triangle[:, term] *= usable[:, None]
        triangle[:, term, term] = square.clamp(min=1e-6).sqrt()
        along[:, term] = inner[rows, pick] * scale
        fresh *= scale[:, None]
        inner = inner.addcmul(fresh, along[:, term, None], value=-1)
        basis.append(fresh)
    gain = torch.linalg.solve_triangular(triangle.mT, along[:, :, None], upper=True)
    return index, gain[:, :, 0]


def _pursue_plain(inner: Tensor, gram: Tensor, n_terms: int) -> tuple[Tensor, Tensor]:
    """Pick greedily with every coefficient one, then pick each term anew given the others."""
    index = torch.empty(len(inner), 0, dtype=torch.long, device=inner.device)
    left = inner - gram.diagonal() / 2
    for _ in range(n_terms):
        pick = left.scatter(1, index, -torch.inf).argmax(1)
        index = torch.cat([index, pick[:, None]], 1)
        left = left - gram.index_select(0, pick)
    for term in list(range(n_terms)) * PLAIN_SWEEPS:
        left = left + gram.index_select(0, index[:, term])
        others = index[:, torch.arange(n_terms, device=index.device) != term]
        index[:, term] = left.scatter(1, others, -torch.inf).argmax(1)
        left = left - gram.index_select(0, index[:, term])
    return index, torch.ones_like(inner[:, :n_terms])


def pursue(inner: Tensor, gram: Tensor, n_terms: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Pick `n_terms` distinct filters a row, index and gains, from products with the bank.

    `inner` (rows, n_lego) and `gram` (n_lego, n_lego) are products in any metric; with signed gains
    the filters have length one in it.
    """
    return (_pursue_signed if signed else _pursue_plain)(inner, gram, n_terms)


def _pursue(x: Tensor, bank: Tensor, n_terms: int, signed: bool) -> State:
    """Pick `n_terms` distinct Lego filters for every fragment."""
    gram = bank @ bank.T
    rows = max(1, WIDE_CHUNK // (len(bank) * (n_terms + 2)))
    parts = []
    for part in torch.split(x, rows):
        inner = part @ bank.T
        with one_thread():
            parts.append(pursue(inner, gram, n_terms, signed))
    index, gain = (torch.cat(both) for both in zip(*parts, strict=True))
    state = State(0.0, bank, index, gain)
    error = float((x - assemble(state)).square().sum(dtype=torch.float64))
    return replace(state, error=error)


def _least_squares(x: Tensor, state: State) -> Tensor:
    """Return the bank that fits best with `state`'s index and coefficients, near the old one."""
    index, gain, n_lego = state.index, state.gain, len(state.bank)
    both = (index[:, :, None] * n_lego + index[:, None, :]).flatten()
    normal = torch.zeros(n_lego * n_lego, dtype=torch.float64, device=x.device)
    normal.index_put_(
        (both,), (gain[:, :, None] * gain[:, None, :]).flatten().double(), accumulate=True
    )
    normal = normal.view(n_lego, n_lego)
    normal.diagonal().add_(1e-7 * normal.diagonal().max() + TINY)
    members, starts, _ = segments(index.flatten(), n_lego)
    rest = x - assemble(state)
    weight = gain.flatten()[members]
    right = segment_sum(rest, members // index.shape[1], starts, weight)
    factor = torch.linalg.cholesky(normal)
    return state.bank + torch.cholesky_solve(right.double(), factor).to(x.dtype)


def alternate(x: Tensor, bank: Tensor, n_terms: int, signed: bool) -> State:
    """Alternate pursuit and a least-squares bank from `bank` (n_lego, d) while the error falls."""
    best = _pursue(x, bank, n_terms, signed)
    for _ in range(LEARN_ROUNDS):
        bank = reseed(x, best, _least_squares(x, best), signed)
        state = _pursue(x, normalize_rows(bank) if signed else bank, n_terms, signed)
        if not state.error < best.error:
            break
        done = best.error - state.error < LEARN_IMPROVEMENT * state.error
        best = state
        if done:
            break
    return best


def learn_plain(x: Tensor, n_lego: int, n_terms: int, generator: torch.Generator) -> State:
    """Begin with a share of the bank for every term, each fitted to what the ones before leave."""
    left, shares = x, []
    for share in torch.arange(n_lego).tensor_split(n_terms):
        state = run_lloyd(left, initialize_bank(left, len(share), False, generator), False)
        left = left - assemble(state)
        shares.append(state.bank)
    best = alternate(x, torch.cat(shares), n_terms, False)
    # One term and filters of zeros for the others: no worse than a single term, whatever x is.
    single = initialize_bank(x, n_lego - n_terms + 1, False, generator)
    zeros = single.new_zeros(n_terms - 1, x.shape[1])
    other = alternate(x, torch.cat([single, zeros]), n_terms, False)
    return best if best.error <= other.error else other
