"""Several terms per fragment: matching pursuit over the bank, alternating with least squares."""

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
PLAIN_SWEEPS = 2  # how often plain pursuit picks each term again
LEARN_IMPROVEMENT = 1e-3  # stop once a round lowers the squared error by less than this share


def _pursue_signed(inner: Tensor, gram: Tensor, n_terms: int) -> tuple[Tensor, Tensor]:
    """Run orthogonal matching pursuit, as `pursue` describes it.

    The picked filters of each row are orthonormalised one by one. Of this basis, only its inner
    products with the whole bank are stored, so that a term costs rows x n_lego x terms. A picked
    filter that depends linearly on the earlier ones gets coefficient 0.
    """
    rows = torch.arange(len(inner), device=inner.device)
    index = torch.empty(len(inner), n_terms, dtype=torch.long, device=inner.device)
    triangle = torch.eye(n_terms).to(inner).repeat(len(inner), 1, 1)
    along = inner.new_zeros(len(inner), n_terms)  # each row's products with its basis vectors
    basis: list[Tensor] = []  # per term (rows, n_lego): products of the basis vectors with the bank
    for term in range(n_terms):
        pick = inner.abs().scatter_(1, index[:, :term], -1.0).argmax(1)
        index[:, term] = pick
        vector = gram.index_select(0, pick)
        for earlier, basis_vector in enumerate(basis):
            product = basis_vector[rows, pick]
            triangle[:, term, earlier] = product
            vector.addcmul_(basis_vector, product[:, None], value=-1)
        square = vector[rows, pick]
        is_independent = square > 1e-6
        scale = torch.where(is_independent, square.clamp(min=1e-6).rsqrt(), 0.0)
        triangle[:, term] *= is_independent[:, None]
        triangle[:, term, term] = square.clamp(min=1e-6).sqrt()
        along[:, term] = inner[rows, pick] * scale
        vector *= scale[:, None]
        inner = inner.addcmul(vector, along[:, term, None], value=-1)
        basis.append(vector)
    gain = torch.linalg.solve_triangular(triangle.mT, along[:, :, None], upper=True)
    return index, gain[:, :, 0]


def _pursue_plain(inner: Tensor, gram: Tensor, n_terms: int) -> tuple[Tensor, Tensor]:
    """Pick greedily with every coefficient one, then pick each term again, given the others."""
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
    """Pick `n_terms` distinct filters per row, from inner products only.

    Args:
        inner: (rows, n_lego), inner products of the rows with the filters of the bank.
        gram: (n_lego, n_lego), inner products of the filters. The products may be in any metric.
        n_terms: filters per row.
        signed: fit gains; the filters must then have length one in that metric. Else all are one.

    Returns:
        Index and gains, both (rows, n_terms).
    """
    return (_pursue_signed if signed else _pursue_plain)(inner, gram, n_terms)


def _pursue_fragments(x: Tensor, bank: Tensor, n_terms: int, signed: bool) -> State:
    """Pick `n_terms` distinct Lego filters for every fragment of `x` (N, d)."""
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


def _fit_bank(x: Tensor, state: State) -> Tensor:
    """Return the bank that fits `x` best for the index and gains of `state`.

    It solves the normal equations for the change of the bank, with a small ridge. So a Lego filter
    that no fragment uses stays as it is.
    """
    index, gain, n_lego = state.index, state.gain, len(state.bank)
    pairs = (index[:, :, None] * n_lego + index[:, None, :]).flatten()
    normal = torch.zeros(n_lego * n_lego, dtype=torch.float64, device=x.device)
    normal.index_put_(
        (pairs,), (gain[:, :, None] * gain[:, None, :]).flatten().double(), accumulate=True
    )
    normal = normal.view(n_lego, n_lego)
    normal.diagonal().add_(1e-7 * normal.diagonal().max() + TINY)
    members, starts, _ = segments(index.flatten(), n_lego)
    residual = x - assemble(state)
    weight = gain.flatten()[members]
    right = segment_sum(residual, members // index.shape[1], starts, weight)
    factor = torch.linalg.cholesky(normal)
    return state.bank + torch.cholesky_solve(right.double(), factor).to(x.dtype)


def alternate(x: Tensor, bank: Tensor, n_terms: int, signed: bool) -> State:
    """Alternate pursuit and a least-squares fit of the bank (n_lego, d) while the error falls."""
    best = _pursue_fragments(x, bank, n_terms, signed)
    for _ in range(LEARN_ROUNDS):
        bank = reseed(x, best, _fit_bank(x, best), signed)
        state = _pursue_fragments(x, normalize_rows(bank) if signed else bank, n_terms, signed)
        if not state.error < best.error:
            break
        done = best.error - state.error < LEARN_IMPROVEMENT * state.error
        best = state
        if done:
            break
    return best


def learn_plain(x: Tensor, n_lego: int, n_terms: int, generator: torch.Generator) -> State:
    """Fit bank and index for several terms, with every coefficient one.

    The start gives each term its share of the bank, fitted to the residual of the earlier terms.
    """
    residual, shares = x, []
    for share in torch.arange(n_lego).tensor_split(n_terms):
        bank = initialize_bank(residual, len(share), False, generator)
        state = run_lloyd(residual, bank, False)
        residual = residual - assemble(state)
        shares.append(state.bank)
    best = alternate(x, torch.cat(shares), n_terms, False)
    # A second start has one term, and filters of zeros for the others. So the result is never worse
    # than that of a single term.
    single = initialize_bank(x, n_lego - n_terms + 1, False, generator)
    zeros = single.new_zeros(n_terms - 1, x.shape[1])
    other = alternate(x, torch.cat([single, zeros]), n_terms, False)
    return best if best.error <= other.error else other
