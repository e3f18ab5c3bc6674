"""What the steps of clustering share: the state of a factorisation, and sums over segments."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1 << 18  # elements of a temporary that should stay in the cache
WIDE_CHUNK = 1 << 23  # elements of a temporary that holds products with all fragments
TINY = 1e-30  # keeps divisors above zero


@dataclass(frozen=True)
class State:
    """A factorisation: its squared error, bank (n_lego, d), index and gain (both (N, n_terms)).

    The bank holds the Lego filters, and a gain is a coefficient; without coefficients all are one.
    """

    error: float
    bank: Tensor
    index: Tensor
    gain: Tensor


def segments(label: Tensor, n_segments: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort members by their segment.

    `label` (N,) is the segment of each member. Returns the member ids sorted by segment (N,), and
    for every segment where it starts in there and its size (both (n_segments,)).
    """
    size = torch.bincount(label, minlength=n_segments)
    return label.argsort(stable=True), size.cumsum(0) - size, size


def segment_sum(rows: Tensor, members: Tensor, starts: Tensor, weight: Tensor) -> Tensor:
    """Sum `weight[i] * rows[members[i]]` over each segment that `starts` opens in `members`."""
    # Not index_add_: on a GPU its order of summation changes from run to run.
    return F.embedding_bag(members, rows, starts, mode="sum", per_sample_weights=weight)


def normalize_rows(rows: Tensor) -> Tensor:
    """Scale every row to length one."""
    return F.normalize(rows, dim=1, eps=TINY)


def assemble(state: State) -> Tensor:
    """Return the approximated fragments (N, d), as sums of Lego filters."""
    return F.embedding_bag(state.index, state.bank, mode="sum", per_sample_weights=state.gain)


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread, for many small operations.

    On shared cores, waiting for the other threads would make them 10 times slower.
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
