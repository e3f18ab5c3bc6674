"""One term per fragment: k-means or gain-shape k-means by Lloyd's algorithm, from a good start."""

import torch
from torch import Tensor

from legocompress.cluster.exchange import exchange
from legocompress.cluster.merge import merge
from legocompress.cluster.state import (
    WIDE_CHUNK,
    State,
    assemble,
    normalize_rows,
    one_thread,
    segment_sum,
    segments,
)

BLOCK = 4096  # fragments that are merged together; limits the Gram matrix to 64 MB in float32
LLOYD_ROUNDS = 10
IMPROVEMENT = 2e-4  # stop once a round lowers the squared error by less than this share


def initialize_bank(x: Tensor, n_lego: int, signed: bool, generator: torch.Generator) -> Tensor:
    """Choose a bank (n_lego, d) to start from, by merging and exchanging fragments of `x` (N, d).

    It is made block by block, so that the Gram matrix stays small: `generator` deals the fragments
    into blocks, and each block makes its share of the bank.
    """
    n_blocks = max(1, min(-(-len(x) // BLOCK), n_lego // 64))
    order = torch.randperm(len(x), generator=generator).to(x.device)
    sizes = torch.arange(n_lego).tensor_split(n_blocks)
    banks = [
        _cluster_block(x[ids[:BLOCK].sort().values], len(share), signed)
        for ids, share in zip(order.tensor_split(n_blocks), sizes, strict=True)
    ]
    return torch.cat(banks)


def _cluster_block(rows: Tensor, n_lego: int, signed: bool) -> Tensor:
    """Cluster one block of fragments (N, d) and return the centres (n_lego, d)."""
    energy = rows.square().sum(1)
    # Such weak rows differ only by rounding. As equal rows, they merge at once, not one by one.
    rows = torch.where((energy > 1e-12 * energy.mean())[:, None], rows, 0.0)
    distinct, copy_of = torch.unique(rows, dim=0, return_inverse=True)
    gram = rows @ rows.T
    if len(distinct) <= n_lego:
        zeros = distinct.new_zeros(n_lego - len(distinct), rows.shape[1])
        return torch.cat([distinct, zeros])
    all_distinct = len(distinct) == len(rows)
    merge_gram = gram if all_distinct else distinct @ distinct.T
    with one_thread():
        label, weight = merge(merge_gram, n_lego, signed)
        if not all_distinct:
            label, weight = label[copy_of], weight[copy_of]
        label, weight = exchange(gram, label, weight, n_lego, signed)
    return centres(rows, label, weight if signed else None, n_lego)


def centres(x: Tensor, label: Tensor, gain: Tensor | None, n_lego: int) -> Tensor:
    """Return the means of the clusters or, with gains (N,), their directions: (n_lego, d).

    A direction has length one.
    """
    members, starts, size = segments(label, n_lego)
    weight = torch.ones_like(x[:, 0]) if gain is None else gain
    total = segment_sum(x, members, starts, weight[members])
    return total / size.clamp(min=1)[:, None] if gain is None else normalize_rows(total)


def _assign(x: Tensor, bank: Tensor, signed: bool) -> State:
    """Give every fragment its best Lego filter and, in the signed form, its best gain."""
    half = bank.square().sum(1) / 2
    picks, gains, error = [], [], 0.0
    for part in torch.split(x, max(1, WIDE_CHUNK // len(bank))):
        score = part @ bank.T
        pick = (score.abs() if signed else score - half).argmax(1, keepdim=True)
        gain = score.gather(1, pick) if signed else torch.ones_like(part[:, :1])
        error += float((part - gain * bank[pick[:, 0]]).square().sum(dtype=torch.float64))
        picks.append(pick)
        gains.append(gain)
    return State(error, bank, torch.cat(picks), torch.cat(gains))


def reseed(x: Tensor, state: State, bank: Tensor, signed: bool) -> Tensor:
    """Replace Lego filters that no fragment uses by the fragments with the largest errors."""
    unused = torch.bincount(state.index.flatten(), minlength=len(bank)) == 0
    if not bool(unused.any()):
        return bank
    error = (x - assemble(state)).square().sum(1)
    worst = error.topk(min(int(unused.sum()), len(x))).indices
    bank = bank.clone()
    bank[unused.nonzero()[: len(worst), 0]] = normalize_rows(x[worst]) if signed else x[worst]
    return bank


def run_lloyd(x: Tensor, bank: Tensor, signed: bool) -> State:
    """Alternate assignment and centres, from `bank` (n_lego, d), while the error falls."""
    best = _assign(x, bank, signed)
    for _ in range(LLOYD_ROUNDS):
        gain = best.gain[:, 0] if signed else None
        bank = reseed(x, best, centres(x, best.index[:, 0], gain, len(bank)), signed)
        state = _assign(x, bank, signed)
        if not state.error < best.error:
            break
        done = best.error - state.error < IMPROVEMENT * state.error
        best = state
        if done:
            break
    return best
