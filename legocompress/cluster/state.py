"""What every step of clustering shares: the state of a factorisation, and sums over segments."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1 << 18  # elements of a temporary that should stay in the cache
WIDE_CHUNK = 1 << 23  # elements of a temporary in products over all fragments
TINY = 1e-30


@dataclass(frozen=True)
class State:
    """A factorisation: squared error, bank (n_lego, d), index and gain (N, n_terms)."""

    error: float
    bank: Tensor
    index: Tensor
    gain: Tensor


def segments(label: Tensor, n_segments: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return member ids sorted by segment, the start of every segment, and its size."""
    size = torch.bincount(label, minlength=n_segments)
    return label.argsort(stable=True), size.cumsum(0) - size, size


def segment_sum(rows: Tensor, members: Tensor, starts: Tensor, weight: Tensor) -> Tensor:
    """Sum `weight[i] * rows[members[i]]` over each segment that `starts` opens in `members`."""
    # index_add_ would do, but its order of summation on a GPU changes from run to run
    return F.embedding_bag(members, rows, starts, mode="sum", per_sample_weights=weight)


def normalize_rows(rows: Tensor) -> Tensor:
    """Scale every row to length one."""
    return F.normalize(rows, dim=1, eps=TINY)


def assemble(state: State) -> Tensor:
    """Rebuild the fragments (N, d) that a state stands for."""
    return F.embedding_bag(state.index, state.bank, mode="sum", per_sample_weights=state.gain)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run many small operations on one thread: where cores are shared, waiting costs 10x more."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
