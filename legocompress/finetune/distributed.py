"""Several processes that train one network: who takes part, and sums over all of them."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from legocompress.errors import TrainingError, first_line

POLL_SECONDS = 0.02  # between looks at the store while processes are missing


@dataclass(frozen=True)
class Processes:
    """This process among the `size` that `torchrun` started; a single one without `torchrun`."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Sum each value over all processes, in float64."""
        if self.size == 1:
            return list(values)
        device = torch.device("cuda", self.local_rank) if dist.get_backend() == "nccl" else "cpu"
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()  # type: ignore[no-any-return]

    def wait(self) -> None:
        """Wait until every process has reached this point."""
        if self.size > 1:
            dist.barrier()


def read_processes() -> Processes:
    """Read rank, size and local rank from the environment variables that `torchrun` sets."""
    return Processes(
        rank=int(os.environ.get("RANK", "0")),
        size=int(os.environ.get("WORLD_SIZE", "1")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
    )


def has_restarted() -> bool:
    """Whether `torchrun` has started the processes again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def agree_on_store(
    store: Any, rank: int, size: int, patience: timedelta = dist.default_pg_timeout
) -> Any:
    """Agree on a part of the store to which only the processes that start now write.

    `torchrun` may keep one store over several restarts. A process that reads there an address that
    an earlier process left waits for ever. So every process writes a fresh random token, and the
    first process answers to each token with the name of the common part, its own token:

        rank r > 0:  hello/r = token;  name = wait for answer/token;  here/name/r = ""
        rank 0:      repeat for every r until here/name/r exists:  answer/(hello/r) = name

    Rank 0 repeats, because the first hello/r that it reads may be an earlier process's.

    Raises:
        RuntimeError: not all processes arrive within `patience`.
    """
    token = uuid.uuid4().hex
    store.set(f"hello/{rank}", token)
    if rank:
        store.wait([f"answer/{token}"], patience)
        name = store.get(f"answer/{token}").decode()
        store.set(f"here/{name}/{rank}", "")
        return dist.PrefixStore(name, store)  # type: ignore[attr-defined]
    deadline = time.monotonic() + patience.total_seconds()
    missing = set(range(1, size))
    while missing:
        for other in sorted(missing):
            if store.check([f"here/{token}/{other}"]):
                missing.remove(other)
            elif store.check([f"hello/{other}"]):
                store.set(f"answer/{store.get(f'hello/{other}').decode()}", token)
        if missing and time.monotonic() > deadline:
            raise RuntimeError(f"after {patience}, {len(missing)} of {size} are missing")
        time.sleep(POLL_SECONDS)
    return dist.PrefixStore(token, store)  # type: ignore[attr-defined]


@contextmanager
def join_process_group(processes: Processes, device: torch.device) -> Iterator[None]:
    """Join the process group that `torchrun` describes, and leave it when the context ends.

    The group communicates over NCCL between GPUs, else over gloo.

    Raises:
        TrainingError: the other processes cannot be reached.
    """
    if processes.size == 1:
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        store, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
        store = agree_on_store(store, rank, size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"the {processes.size} processes cannot be joined: {first_line(error)}"
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()
