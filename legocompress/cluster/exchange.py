"""Improve a start: move single fragments between clusters, with their pull on the centres."""

import torch
from torch import Tensor

from legocompress.cluster.state import CHUNK, TINY, segment_sum, segments

EXCHANGE_ROUNDS = 48
IMPROVEMENT = 2e-4  # stop once a round lowers the squared error by less than this share


class _Exchanger:
    """Hartigan's method in rounds: fragments move to another cluster if that lowers the error.

        explained  (n_lego,)    the energy that each cluster explains
        join_gain  (n_lego, N)  how much more energy a cluster would explain with a fragment added
                                and its centre updated; -inf for the cluster the fragment is in
        to_centre  (N,)         plain: squared distance of a fragment to the mean of its cluster;
                                signed: inner product with the vector of its cluster, of length one

    A fragment moves if its largest `join_gain` exceeds what its cluster would lose without it. In
    the signed form both are bounds on the safe side: the larger eigenvalue of the pair (cluster
    vector, fragment), and one power step of the cluster without the fragment.
    """

    def __init__(
        self, gram: Tensor, label: Tensor, weight: Tensor, n_lego: int, signed: bool
    ) -> None:
        self.gram, self.signed = gram, signed
        self.label = label.clone()
        self.weight = weight.clone() if signed else torch.ones_like(weight)
        self.energy = gram.diagonal().contiguous()
        self.join_gain = gram.new_empty(n_lego, len(gram))
        self.explained = gram.new_zeros(n_lego)
        self.to_centre = torch.zeros_like(self.energy)

    def refresh(self, touched: Tensor, power_steps: int) -> None:
        """Recompute the `touched` clusters: their centres, and what each fragment would add.

        In the signed form, `power_steps` of the power method update the centres.
        """
        members, _, size = segments(self.label, len(self.join_gain))
        is_touched = torch.zeros_like(size, dtype=torch.bool)
        is_touched[touched] = True
        members = members[is_touched[self.label[members]]]
        for part in torch.split(touched, max(1, 4 * CHUNK // len(self.gram))):
            count = size[part]
            n_members = int(count.sum())
            ids, members = members[:n_members], members[n_members:]
            row = torch.repeat_interleave(torch.arange(len(part), device=part.device), count)
            begin = count.cumsum(0) - count
            if self.signed:
                gain, to_centre, explained = self._join_signed(ids, row, begin, power_steps)
            else:
                n_each = count.to(self.energy)
                gain, to_centre, explained = self._join_plain(ids, row, begin, n_each)
            gain[row, ids] = -torch.inf  # a fragment cannot join the cluster that it is in
            self.join_gain[part] = gain
            self.to_centre[ids] = to_centre
            self.explained[part] = explained

    def _join_plain(
        self, ids: Tensor, row: Tensor, begin: Tensor, count: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute `join_gain` and `explained` of some clusters, and `to_centre` of their members.

        With S the sum of a cluster's members and x a fragment,

            join_gain = (2 <S, x> + |x|^2 - |S|^2 / count) / (count + 1)

        Args:
            ids: the members of all these clusters, cluster by cluster.
            row: for each member, the number of its cluster among these.
            begin: for each cluster, where its members start in `ids`.
            count: for each cluster, the number of its members.

        Returns:
            join_gain (clusters, N), to_centre (members,) and explained (clusters,).
        """
        inner = segment_sum(self.gram, ids, begin, self.weight[ids])
        product = inner[row, ids]
        square = _sum_runs(product, begin) / count.square().clamp(min=1)
        explained, share = square * count, 1 / (count + 1)
        to_centre = self.energy[ids] - 2 * product / count[row] + square[row]
        inner.mul_(2 * share[:, None]).addcmul_(self.energy, share[:, None])
        return inner.sub_((explained * share)[:, None]), to_centre, explained

    def _join_signed(
        self, ids: Tensor, row: Tensor, begin: Tensor, power_steps: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Do as `_join_plain` for the signed form, after `power_steps` of the power method.

        With u a cluster's vector of length one and x a fragment,

            gap = (|x|^2 - explained) / 2
            join_gain = gap + sqrt(explained * <u, x>^2 + gap^2)
        """
        for _ in range(power_steps):
            inner = segment_sum(self.gram, ids, begin, self.weight[ids])
            product = inner[row, ids]
            length = _sum_runs(product * self.weight[ids], begin).clamp(min=TINY).sqrt()
            to_centre = product / length[row]
            self.weight[ids] = to_centre
        inner /= length[:, None]
        explained = _sum_runs(to_centre.square(), begin)
        gap = (self.energy - explained[:, None]).div_(2)
        inner.square_().mul_(explained[:, None]).addcmul_(gap, gap).sqrt_().add_(gap)
        return inner, to_centre, explained

    def compute_leave_loss(self) -> Tensor:
        """Compute how much less energy the cluster of each fragment would explain without it."""
        members, starts, size = segments(self.label, len(self.join_gain))
        count = size[self.label]
        if not self.signed:
            share = count / (count - 1).clamp(min=0.5).to(self.energy)
            return self.energy - self.to_centre.clamp(min=0) * share
        value = self.explained[self.label]
        square = self.to_centre.square()
        pair = self._pair_products(members, starts, size)
        rest = value**3 - 2 * value.square() * square + square * pair
        rest -= square * (value - self.energy).square()
        norm = value.square() - 2 * value * square + square * self.energy
        # What the cluster's other members explain along its vector after one power step for them.
        remaining = torch.where(norm > 1e-6 * value.square(), rest / norm.clamp(min=TINY), 0.0)
        return torch.where(count == 1, self.energy, torch.minimum(square, value - remaining))

    def _pair_products(self, members: Tensor, starts: Tensor, size: Tensor) -> Tensor:
        """Sum <x_i, x_r>^2 over the members i of the cluster of each fragment r (at most 32)."""
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

        Moves that share a cluster disturb each other. So unless `freely`, only the best of them is
        made.
        """
        loss = self.compute_leave_loss()
        gain = self.join_gain.amax(0) - loss
        mover = (gain > 1e-6 * self.energy.mean()).nonzero()[:, 0]
        source, gain = self.label[mover], gain[mover]
        target = self.join_gain.index_select(1, mover).argmax(0)
        if not freely:
            best = gain.new_zeros(len(self.join_gain))
            best.scatter_reduce_(0, source, gain, "amax").scatter_reduce_(0, target, gain, "amax")
            wins = (gain >= best[source]) & (gain >= best[target])
            mover, source, target = mover[wins], source[wins], target[wins]
        if self.signed:
            self._turn_vectors(mover, target)
        self.label[mover] = target
        touched: Tensor = torch.unique(torch.cat([source, target]))
        return touched

    def _turn_vectors(self, mover: Tensor, target: Tensor) -> None:
        """Turn each target's vector to the top eigenvector of itself and the joining fragment."""
        value = self.explained[target].clamp(min=TINY)
        is_member = (self.label == target[:, None]).to(self.gram)
        inner = (is_member.mul_(self.gram[mover]) @ self.weight) / value.sqrt()
        angle = torch.atan2(2 * inner, value - self.energy[mover]) / 2
        share = torch.ones_like(self.explained)
        share[target] = 1 / value.sqrt()
        self.weight *= share[self.label]
        self.weight[mover] = angle.sin() / angle.cos().clamp(min=1e-3)


def _sum_runs(values: Tensor, begin: Tensor) -> Tensor:
    """Sum the runs of `values` (N,) that start at `begin`."""
    ids = torch.arange(len(values), device=values.device)
    return segment_sum(values[:, None], ids, begin, torch.ones_like(values))[:, 0]


def exchange(
    gram: Tensor, label: Tensor, weight: Tensor, n_lego: int, signed: bool
) -> tuple[Tensor, Tensor]:
    """Improve the clusters of fragments with the Gram matrix `gram` (N, N).

    A cluster that has lost all its fragments explains nothing, so it attracts the fragments with
    the largest errors.

    Args:
        gram: inner products of the fragments.
        label: the cluster of each fragment (N,).
        weight: the weight of each fragment in its cluster's vector (N,); the plain form ignores it.
        n_lego: clusters.
        signed: whether the fragments have coefficients.

    Returns:
        The better clusters (N,) and weights (N,).
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
