"""A better start: single fragments move between clusters, counting their pull on the centres."""

import torch
from torch import Tensor

from legocompress.cluster.state import CHUNK, TINY, segment_sum, segments

EXCHANGE_ROUNDS = 48
IMPROVEMENT = 2e-4  # stop where a round lowers the squared error by less than this share


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
        members, _, size = segments(self.label, len(self.join))
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
        inner = segment_sum(self.gram, mine, begin, self.weight[mine])
        own = inner[row, mine]
        square = _sum_runs(own, begin) / count.square().clamp(min=1)
        explained, share = square * count, 1 / (count + 1)
        own = self.energy[mine] - 2 * own / count[row] + square[row]
        inner.mul_(2 * share[:, None]).addcmul_(self.energy, share[:, None])
        return inner.sub_((explained * share)[:, None]), own, explained

    def _signed_join(
        self, mine: Tensor, row: Tensor, begin: Tensor, power_steps: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        for _ in range(power_steps):
            inner = segment_sum(self.gram, mine, begin, self.weight[mine])
            own = inner[row, mine]
            length = _sum_runs(own * self.weight[mine], begin).clamp(min=TINY).sqrt()
            own = own / length[row]
            self.weight[mine] = own
        inner /= length[:, None]
        explained = _sum_runs(own.square(), begin)
        gap = (self.energy - explained[:, None]).div_(2)
        inner.square_().mul_(explained[:, None]).addcmul_(gap, gap).sqrt_().add_(gap)
        return inner, own, explained

    def stay(self) -> Tensor:
        members, starts, size = segments(self.label, len(self.join))
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


def _sum_runs(values: Tensor, begin: Tensor) -> Tensor:
    """Sum runs of `values` that start at `begin`."""
    ids = torch.arange(len(values), device=values.device)
    return segment_sum(values[:, None], ids, begin, torch.ones_like(values))[:, 0]


def exchange(
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
