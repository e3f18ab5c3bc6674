"""Merge fragments into clusters from the bottom up (agglomerative clustering), as a start."""

import torch
from torch import Tensor

from legocompress.cluster.state import CHUNK

MERGE_ROUNDS = 64


class _Merger:
    """Agglomerative clustering in rounds: each round merges all pairs of mutually nearest clusters.

    Plain form (Ward): `size` counts the fragments of a cluster, and `table` holds the squared
    distances of the means.

    Signed form: a cluster is represented by its best rank-one fit, a vector v. `size` is its energy
    |v|^2, and `table` holds inner products of the vectors. Merging a pair keeps the larger
    eigenvalue of their Gram matrix; the smaller one is the error added.

        label    (N,)  the cluster of each fragment
        weight   (N,)  the share of each fragment in its cluster's vector
        alive    (n,)  whether the cluster has not been merged into another
        nearest  (n,)  the cluster that is cheapest to merge with, and `cost` what that adds
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
        self.weight = torch.ones_like(energy)
        self.alive = torch.ones_like(self.label, dtype=torch.bool)
        self.nearest = self.label.clone()
        self.cost = torch.full_like(energy, torch.inf)

    def compute_costs(self, rows: Tensor) -> Tensor:
        """Compute the error added by merging each of `rows` with every cluster.

        It is infinite for the cluster itself and for clusters that are not alive.
        """
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
        """Update `nearest` and `cost` of the clusters `rows`."""
        for part in torch.split(rows, max(1, CHUNK // len(self.table))):
            self.cost[part], self.nearest[part] = self.compute_costs(part).min(1)

    def find_pairs(self, at_most: int) -> Tensor:
        """Return the lower partner of every pair of mutually nearest clusters, cheapest first."""
        ids = torch.arange(len(self.nearest), device=self.nearest.device)
        mutual = self.alive & (self.nearest[self.nearest] == ids) & (ids < self.nearest)
        first = mutual.nonzero()[:, 0]
        if len(first) == 0:  # with ties, rounding can make the nearest clusters form a circle
            first = torch.where(self.alive, self.cost, torch.inf).argmin()[None]
        return first[self.cost[first].argsort(stable=True)[:at_most]]

    def merge(self, first: Tensor) -> Tensor:
        """Merge each of `first` with its nearest; return clusters whose nearest is stale now."""
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

    def drop_cheapest(self, n_clusters: int) -> None:
        """Keep the `n_clusters` with the highest costs; the others join the nearest of them."""
        keep = torch.where(self.alive, self.cost, -torch.inf).topk(n_clusters).indices
        self.alive[:] = False
        self.alive[keep] = True
        rows = torch.arange(len(self.alive), device=keep.device)
        self.find_nearest(rows)
        self.nearest[keep] = keep
        self.label = self.nearest[self.label]


def merge(gram: Tensor, n_clusters: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Merge fragments with this Gram matrix (N, N) into `n_clusters`.

    Returns the cluster of every fragment (N,), numbered from 0, and its weight there (N,).
    """
    state = _Merger(gram, signed)
    left = len(gram)
    stale = torch.arange(left, device=gram.device)
    for _ in range(MERGE_ROUNDS):
        if left == n_clusters:
            break
        state.find_nearest(stale)
        first = state.find_pairs(left - n_clusters)
        stale = state.merge(first)
        left -= len(first)
        if left < 0.6 * len(state.table):
            stale = state.compact(state.alive.nonzero()[:, 0])[stale]
    if left > n_clusters:  # only if nearly all fragments are alike
        state.find_nearest(stale)
        state.drop_cheapest(n_clusters)
    state.compact(state.alive.nonzero()[:, 0])
    return state.label, state.weight
