"""Fragments of a conv's filters -> Lego filters, the index that picks them, their coefficients.

A conv gives few fragments per Lego filter (2 to 16), in many dimensions. There Lloyd's algorithm
gets stuck almost where it starts, because a fragment pulls its own centre towards itself. So
`cluster` starts bottom-up, by merging fragments (merge.py), and then moves single fragments with
that pull accounted for (exchange.py). Both work on the fragments' Gram matrix, at a cost that does
not depend on their dimension. lloyd.py and pursuit.py finish, with one term a fragment or several.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from legocompress.cluster.lloyd import lloyd, start
from legocompress.cluster.pursuit import alternate, learn_plain
from legocompress.cluster.state import State
from legocompress.lego.unit import LegoUnit


def cluster(
    fragments: Tensor,
    n_lego: int,
    n_terms: int = 1,
    coefficients: bool = True,
    seed: int = 0,
) -> LegoUnit:
    """Approximate every fragment by a sum of `n_terms` out of `n_lego` shared Lego filters.

    `fragments` (N, d) becomes `lego_filters` (n_lego, d), `index` (N, n_terms), distinct in a row,
    and `coefficients` (N, n_terms), with fragments[r] ~ sum_t coefficients[r, t] *
    lego_filters[index[r, t]] in the least squares sense. Without `coefficients` all are one and
    None is returned: k-means for one term. With them, one term is gain-shape k-means and several
    are a sparse dictionary (orthogonal matching pursuit, method of optimal directions); a Lego
    filter then has the scale of the fragments that use it, so that its coefficients have RMS one.

    Where `n_lego` is at least the number of distinct fragments the result is an exact copy.
    Computed in float32 at least, returned in the dtype of `fragments`; the same seed gives the same
    bytes on one machine, and the global random state is not touched.

    Raises ValueError for anything but a non-empty floating (N, d) matrix of finite values, for
    n_terms outside 1..n_lego, and for several plain terms where n_lego equals N.

    Source: LegoNet (Yang et al., ICML 2019), eq. 3 to 5, for the form; Ward (1963), Hartigan (1975)
    and batch OMP (Rubinstein et al., 2008) for the method.
    """
    return next(clusterings(fragments, n_lego, [n_terms], coefficients, seed))


def clusterings(
    fragments: Tensor, n_lego: int, terms: Sequence[int], coefficients: bool, seed: int
) -> Iterator[LegoUnit]:
    """As `cluster` for several numbers of terms, whose common start is computed once."""
    for n_terms in terms:
        _check(fragments, n_lego, n_terms, coefficients)
    fragments = fragments.detach()
    distinct, number = fragments, torch.arange(len(fragments), device=fragments.device)
    if n_lego < len(fragments):
        distinct, number = torch.unique(fragments, dim=0, return_inverse=True)
    x = fragments.to(torch.promote_types(fragments.dtype, torch.float32))
    scale = x.abs().max()  # not zero where there are two distinct fragments
    bank = None
    for n_terms in terms:
        # As many plain filters as distinct fragments leave no filter of zeros for further terms.
        spare = n_lego > len(distinct) or coefficients or n_terms == 1
        if n_lego >= len(distinct) and spare:
            yield _exact_copy(distinct, number, n_lego, n_terms, coefficients)
            continue
        generator = torch.Generator().manual_seed(seed)
        if coefficients:
            bank = start(x / scale, n_lego, True, generator) if bank is None else bank
            state = _balance(_signed(x / scale, bank, n_terms))
        else:
            state = _plain(x / scale, n_lego, n_terms, generator)
        yield _restore(state, scale, fragments.dtype, coefficients)


def _signed(x: Tensor, bank: Tensor, n_terms: int) -> State:
    return lloyd(x, bank, True) if n_terms == 1 else alternate(x, bank, n_terms, True)


def _plain(x: Tensor, n_lego: int, n_terms: int, generator: torch.Generator) -> State:
    mean = x.mean(0)  # k-means does not see a shift, rounding does
    x = x - mean
    if n_terms == 1:
        state = lloyd(x, start(x, n_lego, False, generator), False)
    else:
        state = learn_plain(x, n_lego, n_terms, generator)
    return replace(state, bank=state.bank + mean / n_terms)


def _check(fragments: Tensor, n_lego: int, n_terms: int, coefficients: bool) -> None:
    if fragments.ndim != 2 or fragments.numel() == 0 or not fragments.is_floating_point():
        raise ValueError(
            "fragments must be a non-empty floating (N, d) matrix, "
            f"got {fragments.dtype} {tuple(fragments.shape)}"
        )
    if not bool(fragments.isfinite().all()):
        raise ValueError("fragments must be finite, got NaN or infinity")
    if not 1 <= n_terms <= n_lego:
        raise ValueError(f"n_terms must be between 1 and n_lego = {n_lego}, got {n_terms}")
    if n_terms > 1 and not coefficients and n_lego == len(fragments):
        raise ValueError(
            f"n_terms must be 1 where n_lego equals the {n_lego} fragments and there are no "
            f"coefficients to switch the other terms off, got {n_terms}"
        )


def _exact_copy(
    rows: Tensor, number: Tensor, n_lego: int, n_terms: int, coefficients: bool
) -> LegoUnit:
    """Copy `rows` into the bank; fragment r is row number[r]."""
    bank = rows.new_zeros(n_lego, rows.shape[1])
    bank[: len(rows)] = rows
    term = torch.arange(n_terms, device=rows.device)
    if coefficients:
        gain = rows.new_zeros(len(number), n_terms)
        gain[:, 0] = 1
        return LegoUnit(bank, (number[:, None] + term) % n_lego, gain)
    zero = len(rows) + (term - 1) % max(1, n_lego - len(rows))
    return LegoUnit(bank, torch.where(term == 0, number[:, None], zero), None)


def _balance(state: State) -> State:
    """Move scale from coefficients to Lego filters until every filter's have RMS one."""
    slot = state.index.flatten()
    square = state.gain.new_zeros(len(state.bank)).index_put_(
        (slot,), state.gain.flatten().square(), accumulate=True
    )
    used = torch.bincount(slot, minlength=len(state.bank))
    scale = (square / used.clamp(min=1)).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    gain = state.gain / scale[state.index]
    return replace(state, bank=state.bank * scale[:, None], gain=gain)


def _restore(state: State, scale: Tensor, dtype: torch.dtype, signed: bool) -> LegoUnit:
    limit = torch.finfo(dtype).max
    bank = (state.bank * scale).clamp(-limit, limit).to(dtype)
    gain = state.gain.clamp(-limit, limit).to(dtype) if signed else None
    return LegoUnit(bank, state.index, gain)
