"""Randomness without a state to save: every draw is a function of the seed and of where it is."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*place: int | str) -> int:
    """A 32-bit seed for a place such as (recipe seed, "image", epoch, position)."""
    digest = hashlib.blake2b(repr(place).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def seed_all(*place: int | str) -> None:
    """Seed the generators of Python, NumPy and PyTorch that draw on the CPU."""
    seed = seed_of(*place)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed looks for GPUs every time


@contextmanager
def randomness_kept() -> Iterator[None]:
    """Give the generators of Python, NumPy and PyTorch (CPU) their states back at the end."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
