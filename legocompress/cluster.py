"""Fragments of a conv's filters -> Lego filters, the index that picks them, their coefficients.

A conv gives few fragments per Lego filter (2 to 16), in many dimensions. There Lloyd's algorithm
gets stuck almost where it starts, because a fragment pulls its own centre towards itself. So
`cluster` starts bottom-up, by merging fragments, and then moves single fragments with that pull
accounted for. Both work on the fragments' Gram matrix, at a cost that does not depend on their
dimension. It is one long file because these steps serve nothing but `cluster`, at its end.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 4096  # fragments merged together: bounds time and the Gram matrix (64 MB in float32)
CHUNK = 1 << 18  # elements of a temporary that should stay in the cache
WIDE_CHUNK = 1 << 23  # elements of a temporary in products over all fragments
MERGE_ROUNDS = 64
EXCHANGE_ROUNDS = 48
LLOYD_ROUNDS = 10
LEARN_ROUNDS = 20
PLAIN_SWEEPS = 2
IMPROVEMENT = 2e-4  # stop where a round lowers the squared error by less than this share
LEARN_IMPROVEMENT = 1e-3
TINY = 1e-30


class Factors(NamedTuple):
    """Lego filters (n_lego, d), index (N, n_terms) int64 and coefficients (N, n_terms) or None."""

    lego_filters: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody wants here
    coefficients: Tensor | None


@dataclass(frozen=True)
class _State:
    error: float
    bank: Tensor
    index: Tensor
    gain: Tensor


def _segments(label: Tensor, n_segments: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return member ids sorted by segment, the start of every segment, and its size."""
    size = torch.bincount(label, minlength=n_segments)
    return label.argsort(stable=True), size.cumsum(0) - size, size


def _segment_sum(rows: Tensor, members: Tensor, starts: Tensor, weight: Tensor) -> Tensor:
    # index_add_ would do, but its order of summation on a GPU changes from run to run
    return F.embedding_bag(members, rows, starts, mode="sum", per_sample_weights=weight)


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=1, eps=TINY)


# ---------------------------------------------------------------- start: merge from the bottom up


class _Merger:
    """Agglomerative clustering in rounds: every pair of mutually nearest clusters merges at once.

    Plain form (Ward): a cluster has a `size`, `table` holds squared distances of the means.
    Signed form: a cluster is its best rank-one fit, a vector v with energy |v|^2 as `size`; `table`
    holds inner products; merging keeps the larger eigenvalue of the pair and loses the smaller.
    """

    def __init__(self, gram: Tensor, signed: bool) -> None:
        n = len(gram)
        energy = gram.diagonal().clone()
        self.signed = signed
        self.size = energy if signed else torch.ones_like(energy)
        self.table = gram.clone()
        if not signed:
            self.table.mul_(-2).add_(energy).add_(energy[:, None]).clamp_(min=0)
        self.label = torch.arange(n, device=gram.device)
        self.weight = torch.ones_like(energy)  # share of a fragment in its cluster's vector
        self.alive = torch.ones_like(self.label, dtype=torch.bool)
        self.nearest = self.label.clone()
        self.cost = torch.full_like(energy, torch.inf)

    def costs(self, rows: Tensor) -> Tensor:
        """Error added by merging each of `rows` with every cluster, infinite where impossible."""
        table = self.table.index_select(0, rows)
        if self.signed:
            half = self.size / 2
            gap = half[rows, None] - half
            table.mul_(table).addcmul_(gap, gap).sqrt_().neg_()
            table.add_(torch.add(half[rows, None], half, out=gap))
        else:
            inverse = 1 / self.size
            table.div_(inverse[rows, None] + inverse)
        table.add_(torch.where(self.alive, 0.0, torch.inf).to(table))
        return table.scatter_(1, rows[:, None], torch.inf)

    def find_nearest(self, rows: Tensor) -> None:
        for part in torch.split(rows, max(1, CHUNK // len(self.table))):
            self.cost[part], self.nearest[part] = self.costs(part).min(1)

    def pairs(self, at_most: int) -> Tensor:
        """Return the lower partner of every pair of mutually nearest clusters, cheapest first."""
        ids = torch.arange(len(self.nearest), device=self.nearest.device)
        mutual = self.alive & (self.nearest[self.nearest] == ids) & (ids < self.nearest)
        first = mutual.nonzero()[:, 0]
        if len(first) == 0:  # rounding can break a tie in a circle
            first = torch.where(self.alive, self.cost, torch.inf).argmin()[None]
        return first[self.cost[first].argsort(stable=True)[:at_most]]

    def merge(self, first: Tensor) -> Tensor:
        """Merge each of `first` with its nearest; return whose nearest is now stale."""
        second = self.nearest[first]
        product = self.table[first, second]
        if self.signed:
            gap = (self.size[first] - self.size[second]) / 2
            angle = torch.atan2(product, gap) / 2
            p, q, shift = angle.cos(), angle.sin(), torch.zeros_like(angle)
            size = (self.size[first] + self.size[second]) / 2 + torch.hypot(gap, product)
        else:
            size = self.size[first] + self.size[second]
            p, q = self.size[first] / size, self.size[second] / size
            shift = p * q * product
        rows = self.table.index_select(0, first).mul_(p[:, None])
        rows.addcmul_(self.table.index_select(0, second), q[:, None]).sub_(shift[:, None])
        block = rows.index_select(1, first) * p + rows.index_select(1, second) * q - shift
        rows.index_copy_(1, first, block)
        self.table.index_copy_(0, first, rows)
        self.table.index_copy_(1, first, rows.T.contiguous())
        self.size[first] = size
        share = torch.ones_like(self.size)
        share[first], share[second] = p, q
        self.weight *= share[self.label]
        target = torch.arange(len(share), device=share.device)
        target[second] = first
        self.label = target[self.label]
        self.alive[second] = False
        changed = target != torch.arange(len(share), device=share.device)
        changed[first] = True
        return (self.alive & (changed | changed[self.nearest])).nonzero()[:, 0]

    def compact(self, keep: Tensor) -> Tensor:
        """Drop merged clusters from the table; return the new number of every old cluster."""
        number = self.alive.cumsum(0) - 1
        self.table = self.table.index_select(0, keep).index_select(1, keep)
        self.label, self.nearest = number[self.label], number[self.nearest[keep]]
        self.size, self.cost, self.alive = self.size[keep], self.cost[keep], self.alive[keep]
        return number

    def drop(self, n_clusters: int) -> None:
        """Keep the `n_clusters` that are dearest to merge; the others join the nearest of them."""
        keep = torch.where(self.alive, self.cost, -torch.inf).topk(n_clusters).indices
        self.alive[:] = False
        self.alive[keep] = True
        rows = torch.arange(len(self.alive), device=keep.device)
        self.find_nearest(rows)
        self.nearest[keep] = keep
        self.label = self.nearest[self.label]


def _merge(gram: Tensor, n_clusters: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Return the cluster of every fragment (N,), numbered from 0, and its weight there (N,)."""
    state = _Merger(gram, signed)
    left = len(gram)
    stale = torch.arange(left, device=gram.device)
    for _ in range(MERGE_ROUNDS):
        if left == n_clusters:
            break
        state.find_nearest(stale)
        first = state.pairs(left - n_clusters)
        stale = state.merge(first)
        left -= len(first)
        if left < 0.6 * len(state.table):
            stale = state.compact(state.alive.nonzero()[:, 0])[stale]
    if left > n_clusters:  # only where fragments are nearly all alike
        state.find_nearest(stale)
        state.drop(n_clusters)
    state.compact(state.alive.nonzero()[:, 0])
    return state.label, state.weight


# ------------------------------------------------------------ exchange: move single fragments


class _Exchanger:
    """Hartigan's method in rounds: fragments move where the error falls.

    `join[c, r]` is how much more energy cluster c would explain with fragment r, its own change
    included; `stay[r]` is how much less r's own cluster would explain without it. In the signed
    form both are bounds on the safe side: the larger eigenvalue of the pair (cluster vector,
    fragment), and one power step of the cluster without the fragment.
    """

    def __init__(
        self, gram: Tensor, label: Tensor, weight: Tensor, n_lego: int, signed: bool
    ) -> None:
        self.gram, self.signed = gram, signed
        self.label = label.clone()
        self.weight = weight.clone() if signed else torch.ones_like(weight)
        self.energy = gram.diagonal().contiguous()
        self.join = gram.new_empty(n_lego, len(gram))
        self.explained = gram.new_zeros(n_lego)
        self.own = torch.zeros_like(self.energy)  # what a fragment shares with its centre

    def refresh(self, touched: Tensor, power_steps: int) -> None:
        """Recompute the centres of `touched` clusters and what any fragment would bring them."""
        members, _, size = _segments(self.label, len(self.join))
        chosen = torch.zeros_like(size, dtype=torch.bool)
        chosen[touched] = True
        members = members[chosen[self.label[members]]]
        for part in torch.split(touched, max(1, 4 * CHUNK // len(self.gram))):
            count = size[part]
            mine, members = members[: int(count.sum())], members[int(count.sum()) :]
            row = torch.repeat_interleave(torch.arange(len(part), device=part.device), count)
            begin = count.cumsum(0) - count
            if self.signed:
                join, own, explained = self._signed_join(mine, row, begin, power_steps)
            else:
                join, own, explained = self._plain_join(mine, row, begin, count.to(self.energy))
            join[row, mine] = -torch.inf  # a fragment cannot join where it is
            self.join[part], self.own[mine], self.explained[part] = join, own, explained

    def _plain_join(
        self, mine: Tensor, row: Tensor, begin: Tensor, count: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        inner = _segment_sum(self.gram, mine, begin, self.weight[mine])
        own = inner[row, mine]
        square = _row_sum(own, begin) / count.square().clamp(min=1)
        explained, share = square * count, 1 / (count + 1)
        own = self.energy[mine] - 2 * own / count[row] + square[row]
        inner.mul_(2 * share[:, None]).addcmul_(self.energy, share[:, None])
        return inner.sub_((explained * share)[:, None]), own, explained

    def _signed_join(
        self, mine: Tensor, row: Tensor, begin: Tensor, power_steps: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        for _ in range(power_steps):
            inner = _segment_sum(self.gram, mine, begin, self.weight[mine])
            own = inner[row, mine]
            length = _row_sum(own * self.weight[mine], begin).clamp(min=TINY).sqrt()
            own = own / length[row]
            self.weight[mine] = own
        inner /= length[:, None]
        explained = _row_sum(own.square(), begin)
        gap = (self.energy - explained[:, None]).div_(2)
        inner.square_().mul_(explained[:, None]).addcmul_(gap, gap).sqrt_().add_(gap)
        return inner, own, explained

    def stay(self) -> Tensor:
        members, starts, size = _segments(self.label, len(self.join))
        count = size[self.label]
        if not self.signed:
            share = count / (count - 1).clamp(min=0.5).to(self.energy)
            return self.energy - self.own.clamp(min=0) * share
        value = self.explained[self.label]
        square = self.own.square()
        pair = self._pair_products(members, starts, size)
        rest = value**3 - 2 * value.square() * square + square * pair
        rest -= square * (value - self.energy).square()
        norm = value.square() - 2 * value * square + square * self.energy
        kept = torch.where(norm > 1e-6 * value.square(), rest / norm.clamp(min=TINY), 0.0)
        return torch.where(count == 1, self.energy, torch.minimum(square, value - kept))

    def _pair_products(self, members: Tensor, starts: Tensor, size: Tensor) -> Tensor:
        """Sum over (at most 32) members i of fragment r's cluster of <x_i, x_r>^2."""
        ids = torch.arange(len(self.gram), device=members.device)
        place = torch.empty_like(ids)
        place[members] = ids
        start, count = starts[self.label], size[self.label]
        total = self.energy.square()
        for step in range(1, min(int(size.max()), 32)):
            other = members[start + (place - start + step) % count]
            total += torch.where(step < count, self.gram[ids, other].square(), 0.0)
        return total

    def move(self, freely: bool) -> Tensor:
        """Move fragments where that gains; return the clusters touched.

        Moves that share a cluster disturb each other: unless `freely`, only the best of them runs.
        """
        stay = self.stay()
        gain = self.join.amax(0) - stay
        mover = (gain > 1e-6 * self.energy.mean()).nonzero()[:, 0]
        source, gain = self.label[mover], gain[mover]
        target = self.join.index_select(1, mover).argmax(0)
        if not freely:
            best = gain.new_zeros(len(self.join))
            best.scatter_reduce_(0, source, gain, "amax").scatter_reduce_(0, target, gain, "amax")
            wins = (gain >= best[source]) & (gain >= best[target])
            mover, source, target = mover[wins], source[wins], target[wins]
        if self.signed:
            self._turn(mover, target)
        self.label[mover] = target
        touched: Tensor = torch.unique(torch.cat([source, target]))
        return touched

    def _turn(self, mover: Tensor, target: Tensor) -> None:
        """Point each target's vector at the top eigenvector of itself and the joining fragment."""
        value = self.explained[target].clamp(min=TINY)
        among = (self.label == target[:, None]).to(self.gram)
        inner = (among.mul_(self.gram[mover]) @ self.weight) / value.sqrt()
        angle = torch.atan2(2 * inner, value - self.energy[mover]) / 2
        share = torch.ones_like(self.explained)
        share[target] = 1 / value.sqrt()
        self.weight *= share[self.label]
        self.weight[mover] = angle.sin() / angle.cos().clamp(min=1e-3)


def _row_sum(values: Tensor, begin: Tensor) -> Tensor:
    """Sum runs of `values` that start at `begin`."""
    ids = torch.arange(len(values), device=values.device)
    return _segment_sum(values[:, None], ids, begin, torch.ones_like(values))[:, 0]


def _exchange(
    gram: Tensor, label: Tensor, weight: Tensor, n_lego: int, signed: bool
) -> tuple[Tensor, Tensor]:
    """Return better clusters (N,) of the fragments and their weights (N,).

    A cluster that lost all its fragments explains nothing, so the worst served are drawn to it.
    """
    state = _Exchanger(gram, label, weight, n_lego, signed)
    energy = float(state.energy.double().sum())
    touched = torch.arange(n_lego, device=gram.device)
    freely, explained = True, -torch.inf
    best = state.label, state.weight
    for turn in range(EXCHANGE_ROUNDS):
        state.refresh(touched, power_steps=2 if turn else 4)
        total = float(state.explained.double().sum())
        done = total - explained < IMPROVEMENT * (energy - total)
        if total > explained:
            explained, best = total, (state.label.clone(), state.weight.clone())
        if done and not freely:
            break
        freely = freely and not done
        touched = state.move(freely)
        if len(touched) == 0:
            break
    return best


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run many small operations on one thread: where cores are shared, waiting costs 10x more."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def _start(x: Tensor, n_lego: int, signed: bool, generator: torch.Generator) -> Tensor:
    """Return a bank (n_lego, d), block by block so that a Gram matrix stays small."""
    n_blocks = max(1, min(-(-len(x) // BLOCK), n_lego // 64))
    order = torch.randperm(len(x), generator=generator).to(x.device)
    sizes = torch.arange(n_lego).tensor_split(n_blocks)
    banks = []
    for ids, mine in zip(order.tensor_split(n_blocks), sizes, strict=True):
        rows = x[ids[:BLOCK].sort().values]
        energy = rows.square().sum(1)
        # Rows this weak differ by rounding only; alike, they merge at once instead of one by one.
        rows = torch.where((energy > 1e-12 * energy.mean())[:, None], rows, 0.0)
        distinct, number = torch.unique(rows, dim=0, return_inverse=True)
        gram = rows @ rows.T
        if len(distinct) <= len(mine):
            banks.append(
                torch.cat([distinct, distinct.new_zeros(len(mine) - len(distinct), x.shape[1])])
            )
            continue
        same = len(distinct) == len(rows)
        small = gram if same else distinct @ distinct.T
        with _one_thread():
            label, weight = _merge(small, len(mine), signed)
            if not same:
                label, weight = label[number], weight[number]
            label, weight = _exchange(gram, label, weight, len(mine), signed)
        banks.append(_centres(rows, label, weight if signed else None, len(mine)))
    return torch.cat(banks)


# ------------------------------------------------------------------------------ one term: Lloyd


def _centres(x: Tensor, label: Tensor, gain: Tensor | None, n_lego: int) -> Tensor:
    members, starts, size = _segments(label, n_lego)
    weight = torch.ones_like(x[:, 0]) if gain is None else gain
    total = _segment_sum(x, members, starts, weight[members])
    return total / size.clamp(min=1)[:, None] if gain is None else _unit(total)


def _assign(x: Tensor, bank: Tensor, signed: bool) -> _State:
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
    return _State(error, bank, torch.cat(picks), torch.cat(gains))


def _reseed(x: Tensor, state: _State, bank: Tensor, signed: bool) -> Tensor:
    """Put the worst served fragments in place of Lego filters that no fragment uses."""
    unused = torch.bincount(state.index.flatten(), minlength=len(bank)) == 0
    if not bool(unused.any()):
        return bank
    missing = (x - _assemble(state)).square().sum(1)
    worst = missing.topk(min(int(unused.sum()), len(x))).indices
    bank = bank.clone()
    bank[unused.nonzero()[: len(worst), 0]] = _unit(x[worst]) if signed else x[worst]
    return bank


def _assemble(state: _State) -> Tensor:
    return F.embedding_bag(state.index, state.bank, mode="sum", per_sample_weights=state.gain)


def _lloyd(x: Tensor, bank: Tensor, signed: bool) -> _State:
    best = _assign(x, bank, signed)
    for _ in range(LLOYD_ROUNDS):
        gain = best.gain[:, 0] if signed else None
        bank = _reseed(x, best, _centres(x, best.index[:, 0], gain, len(bank)), signed)
        state = _assign(x, bank, signed)
        if not state.error < best.error:
            break
        done = best.error - state.error < IMPROVEMENT * state.error
        best = state
        if done:
            break
    return best


# ------------------------------------------------------- several terms: pursuit, then least squares


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


def _pursue(x: Tensor, bank: Tensor, n_terms: int, signed: bool) -> _State:
    """Pick `n_terms` distinct Lego filters for every fragment."""
    pick = _pursue_signed if signed else _pursue_plain
    gram = bank @ bank.T
    rows = max(1, WIDE_CHUNK // (len(bank) * (n_terms + 2)))
    parts = []
    for part in torch.split(x, rows):
        inner = part @ bank.T
        with _one_thread():
            parts.append(pick(inner, gram, n_terms))
    index, gain = (torch.cat(both) for both in zip(*parts, strict=True))
    state = _State(0.0, bank, index, gain)
    error = float((x - _assemble(state)).square().sum(dtype=torch.float64))
    return replace(state, error=error)


def _least_squares(x: Tensor, state: _State) -> Tensor:
    """Return the bank that fits best with `state`'s index and coefficients, near the old one."""
    index, gain, n_lego = state.index, state.gain, len(state.bank)
    both = (index[:, :, None] * n_lego + index[:, None, :]).flatten()
    normal = torch.zeros(n_lego * n_lego, dtype=torch.float64, device=x.device)
    normal.index_put_(
        (both,), (gain[:, :, None] * gain[:, None, :]).flatten().double(), accumulate=True
    )
    normal = normal.view(n_lego, n_lego)
    normal.diagonal().add_(1e-7 * normal.diagonal().max() + TINY)
    members, starts, _ = _segments(index.flatten(), n_lego)
    rest = x - _assemble(state)
    weight = gain.flatten()[members]
    right = _segment_sum(rest, members // index.shape[1], starts, weight)
    factor = torch.linalg.cholesky(normal)
    return state.bank + torch.cholesky_solve(right.double(), factor).to(x.dtype)


def _alternate(x: Tensor, bank: Tensor, n_terms: int, signed: bool) -> _State:
    best = _pursue(x, bank, n_terms, signed)
    for _ in range(LEARN_ROUNDS):
        bank = _reseed(x, best, _least_squares(x, best), signed)
        state = _pursue(x, _unit(bank) if signed else bank, n_terms, signed)
        if not state.error < best.error:
            break
        done = best.error - state.error < LEARN_IMPROVEMENT * state.error
        best = state
        if done:
            break
    return best


def _learn_plain(x: Tensor, n_lego: int, n_terms: int, generator: torch.Generator) -> _State:
    """Begin with a share of the bank for every term, each fitted to what the ones before leave."""
    left, shares = x, []
    for share in torch.arange(n_lego).tensor_split(n_terms):
        state = _lloyd(left, _start(left, len(share), False, generator), False)
        left = left - _assemble(state)
        shares.append(state.bank)
    best = _alternate(x, torch.cat(shares), n_terms, False)
    # One term and filters of zeros for the others: no worse than a single term, whatever x is.
    single = _start(x, n_lego - n_terms + 1, False, generator)
    zeros = single.new_zeros(n_terms - 1, x.shape[1])
    other = _alternate(x, torch.cat([single, zeros]), n_terms, False)
    return best if best.error <= other.error else other


# -------------------------------------------------------------------------------------- the door


def cluster(
    fragments: Tensor,
    n_lego: int,
    n_terms: int = 1,
    coefficients: bool = True,
    seed: int = 0,
) -> Factors:
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
    _check(fragments, n_lego, n_terms, coefficients)
    fragments = fragments.detach()
    if n_lego >= len(fragments):
        number = torch.arange(len(fragments), device=fragments.device)
        return _exact_copy(fragments, number, n_lego, n_terms, coefficients)
    distinct, number = torch.unique(fragments, dim=0, return_inverse=True)
    if len(distinct) < n_lego or (len(distinct) == n_lego and (coefficients or n_terms == 1)):
        return _exact_copy(distinct, number, n_lego, n_terms, coefficients)
    generator = torch.Generator().manual_seed(seed)
    x = fragments.to(torch.promote_types(fragments.dtype, torch.float32))
    scale = x.abs().max()  # not zero: there are two distinct fragments
    x = x / scale
    if coefficients:
        bank = _start(x, n_lego, True, generator)
        state = _lloyd(x, bank, True) if n_terms == 1 else _alternate(x, bank, n_terms, True)
        return _restore(_balance(state), scale, fragments.dtype, True)
    mean = x.mean(0)  # k-means does not see a shift, rounding does
    if n_terms == 1:
        state = _lloyd(x - mean, _start(x - mean, n_lego, False, generator), False)
    else:
        state = _learn_plain(x - mean, n_lego, n_terms, generator)
    return _restore(replace(state, bank=state.bank + mean / n_terms), scale, fragments.dtype, False)


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
) -> Factors:
    """Copy `rows` into the bank; fragment r is row number[r]."""
    bank = rows.new_zeros(n_lego, rows.shape[1])
    bank[: len(rows)] = rows
    term = torch.arange(n_terms, device=rows.device)
    if coefficients:
        gain = rows.new_zeros(len(number), n_terms)
        gain[:, 0] = 1
        return Factors(bank, (number[:, None] + term) % n_lego, gain)
    zero = len(rows) + (term - 1) % max(1, n_lego - len(rows))
    return Factors(bank, torch.where(term == 0, number[:, None], zero), None)


def _balance(state: _State) -> _State:
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


def _restore(state: _State, scale: Tensor, dtype: torch.dtype, signed: bool) -> Factors:
    limit = torch.finfo(dtype).max
    bank = (state.bank * scale).clamp(-limit, limit).to(dtype)
    gain = state.gain.clamp(-limit, limit).to(dtype) if signed else None
    return Factors(bank, state.index, gain)
