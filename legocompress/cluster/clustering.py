"""Turn fragments of a conv's filters into Lego filters, an index and coefficients.

A conv has only 2 to 16 fragments per Lego filter, in many dimensions. In this case Lloyd's
algorithm gets stuck close to where it starts, because each fragment pulls the centre of its cluster
towards itself. So `cluster` works in three steps:

    merge.py                 merge fragments bottom-up into clusters
    exchange.py              move single fragments between clusters, with that pull accounted for
    lloyd.py or pursuit.py   finish with one term per fragment, or with several

The first two steps work on the Gram matrix of the fragments, so that their cost does not depend on
the dimension. In this room, "signed" means with coefficients and "plain" means without.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from legocompress.cluster.lloyd import initialize_bank, run_lloyd
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

    It minimises the squared error of

        fragments[r] ~ sum_t coefficients[r, t] * lego_filters[index[r, t]]

    With `coefficients`, one term is gain-shape k-means, and several terms are a sparse dictionary
    (orthogonal matching pursuit, method of optimal directions). Each Lego filter is scaled so that
    its coefficients have RMS one. Without them, every coefficient is one; one term is k-means.

    If there are no more distinct fragments than Lego filters, the result is an exact copy. The
    computation runs in float32 or higher. The same seed gives the same bytes on one machine, and
    the global random state is not touched.

    Args:
        fragments: (N, d).
        n_lego: Lego filters to make.
        n_terms: Lego filters summed per fragment.
        coefficients: whether each term has a coefficient.
        seed: decides how fragments are dealt into blocks, which are clustered apart.

    Returns:
        `lego_filters` (n_lego, d), `index` (N, n_terms) with distinct entries in each row, and
        `coefficients` (N, n_terms) or None; all floats in the dtype of `fragments`.

    Raises:
        ValueError: `fragments` is not a non-empty floating (N, d) matrix of finite values, n_terms
            is not in 1..n_lego, or there are several terms without coefficients and n_lego = N.

    Source: LegoNet (Yang et al., ICML 2019), eq. 3 to 5, for the form; Ward (1963), Hartigan (1975)
    and batch OMP (Rubinstein et al., 2008) for the method.
    """
    return next(clusterings(fragments, n_lego, [n_terms], coefficients, seed))


def clusterings(
    fragments: Tensor, n_lego: int, terms: Sequence[int], coefficients: bool, seed: int
) -> Iterator[LegoUnit]:
    """Yield what `cluster` returns for each number of terms, from a start computed only once."""
    for n_terms in terms:
        _check_arguments(fragments, n_lego, n_terms, coefficients)
    fragments = fragments.detach()
    # fragments[r] is distinct[copy_of[r]]
    distinct, copy_of = fragments, torch.arange(len(fragments), device=fragments.device)
    if n_lego < len(fragments):
        distinct, copy_of = torch.unique(fragments, dim=0, return_inverse=True)
    x = fragments.to(torch.promote_types(fragments.dtype, torch.float32))
    scale = x.abs().max()  # not zero where there are two distinct fragments
    bank = None
    for n_terms in terms:
        # Without coefficients, an exact copy needs a filter of zeros for the terms after the first.
        can_disable_terms = n_lego > len(distinct) or coefficients or n_terms == 1
        if n_lego >= len(distinct) and can_disable_terms:
            yield _copy_exactly(distinct, copy_of, n_lego, n_terms, coefficients)
            continue
        generator = torch.Generator().manual_seed(seed)
        if coefficients:
            bank = initialize_bank(x / scale, n_lego, True, generator) if bank is None else bank
            state = _balance_scales(_fit_signed(x / scale, bank, n_terms))
        else:
            state = _fit_plain(x / scale, n_lego, n_terms, generator)
        yield _restore_scale(state, scale, fragments.dtype, coefficients)


def _fit_signed(x: Tensor, bank: Tensor, n_terms: int) -> State:
    """Fit bank, index and coefficients from a start `bank` (n_lego, d)."""
    return run_lloyd(x, bank, True) if n_terms == 1 else alternate(x, bank, n_terms, True)


def _fit_plain(x: Tensor, n_lego: int, n_terms: int, generator: torch.Generator) -> State:
    """Fit bank and index, with every coefficient one."""
    mean = x.mean(0)  # a shift does not change k-means, but it would cost precision
    x = x - mean
    if n_terms == 1:
        state = run_lloyd(x, initialize_bank(x, n_lego, False, generator), False)
    else:
        state = learn_plain(x, n_lego, n_terms, generator)
    return replace(state, bank=state.bank + mean / n_terms)


def _check_arguments(fragments: Tensor, n_lego: int, n_terms: int, coefficients: bool) -> None:
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


def _copy_exactly(
    distinct: Tensor, copy_of: Tensor, n_lego: int, n_terms: int, coefficients: bool
) -> LegoUnit:
    """Copy the `distinct` fragments into the bank, where fragment r is distinct[copy_of[r]].

    Terms after the first add nothing: their coefficient is zero or, without coefficients, their
    Lego filter is.
    """
    bank = distinct.new_zeros(n_lego, distinct.shape[1])
    bank[: len(distinct)] = distinct
    term = torch.arange(n_terms, device=distinct.device)
    if coefficients:
        gain = distinct.new_zeros(len(copy_of), n_terms)
        gain[:, 0] = 1
        return LegoUnit(bank, (copy_of[:, None] + term) % n_lego, gain)
    zero_filter = len(distinct) + (term - 1) % max(1, n_lego - len(distinct))
    return LegoUnit(bank, torch.where(term == 0, copy_of[:, None], zero_filter), None)


def _balance_scales(state: State) -> State:
    """Move scale from coefficients to Lego filters, so that each filter's gains have RMS one."""
    picked = state.index.flatten()
    square = state.gain.new_zeros(len(state.bank)).index_put_(
        (picked,), state.gain.flatten().square(), accumulate=True
    )
    n_uses = torch.bincount(picked, minlength=len(state.bank))
    scale = (square / n_uses.clamp(min=1)).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    gain = state.gain / scale[state.index]
    return replace(state, bank=state.bank * scale[:, None], gain=gain)


def _restore_scale(state: State, scale: Tensor, dtype: torch.dtype, signed: bool) -> LegoUnit:
    """Undo the division by `scale` and return the unit in `dtype`, without overflow."""
    limit = torch.finfo(dtype).max
    bank = (state.bank * scale).clamp(-limit, limit).to(dtype)
    gain = state.gain.clamp(-limit, limit).to(dtype) if signed else None
    return LegoUnit(bank, state.index, gain)
