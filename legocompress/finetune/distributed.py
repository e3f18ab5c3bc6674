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


@dataclass(frozen=True)
class Processes:
    """This process among those that `torchrun` started; one alone without it."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all processes, in float64."""
        if self.size == 1:
            return list(values)
        device = torch.device("cuda", self.local_rank) if dist.get_backend() == "nccl" else "cpu"
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()  # type: ignore[no-any-return]

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()


def from_environment() -> Processes:
    """What `torchrun` says in the environment."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    rank, size, local = (
        int(os.environ.get(name, default)) for name, default in zip(names, "010", strict=True)
    )
    return Processes(rank, size, local)


def restarted() -> bool:
    """Whether `torchrun` has started the processes again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def meet(store: Any, rank: int, size: int, patience: timedelta = dist.default_pg_timeout) -> Any:
    """A part of the store that only the processes that have started now write to.

    `torchrun` may keep one store while it starts its processes again and again; a process that
    reads an address there that an earlier one left waits for ever. So each says a word of its own,
    and the first process answers to that word with the name of their common part, until each has
    confirmed this name.

    Raises:
        RuntimeError: they do not all come within `patience`.
    """
    word = uuid.uuid4().hex
    store.set(f"hello/{rank}", word)
    if rank:
        store.wait([f"answer/{word}"], patience)
        name = store.get(f"answer/{word}").decode()
        store.set(f"here/{name}/{rank}", "")
        return dist.PrefixStore(name, store)  # type: ignore[attr-defined]
    deadline = time.monotonic() + patience.total_seconds()
    missing = set(range(1, size))
    while missing:
        for other in sorted(missing):
            if store.check([f"here/{word}/{other}"]):
                missing.remove(other)
            elif store.check([f"hello/{other}"]):
                store.set(f"answer/{store.get(f'hello/{other}').decode()}", word)
        if missing and time.monotonic() > deadline:
            raise RuntimeError(f"after {patience}, {len(missing)} of {size} are missing")
        time.sleep(0.02)
    return dist.PrefixStore(word, store)  # type: ignore[attr-defined]


@contextmanager
def joined(processes: Processes, device: torch.device) -> Iterator[None]:
    """Join the process group that `torchrun` describes (NCCL for GPUs, else gloo), then leave it.

    Raises:
        TrainingError: the others cannot be reached.
    """
    if processes.size == 1:
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        store, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
        store = meet(store, rank, size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"the {processes.size} processes cannot be joined: {first_line(error)}"
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()
