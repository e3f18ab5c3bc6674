"""Randomness without a state to save: every draw depends only on the seed and on its place.

A *place* is a tuple that names where a draw happens, such as (recipe seed, "image", epoch,
position). The same place always gives the same draws.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*place: int | str) -> int:
    """Hash a place to a 32-bit seed."""
    digest = hashlib.blake2b(repr(place).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def seed_all(*place: int | str) -> None:
    """Seed the CPU generators of Python, NumPy and PyTorch for a place."""
    seed = derive_seed(*place)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed looks for GPUs every time


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Restore the CPU generators of Python, NumPy and PyTorch when the context ends."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
