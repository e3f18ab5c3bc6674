"""Draws depend on their place only."""

from __future__ import annotations

import random

import numpy as np
import torch

from legocompress.finetune.seeding import derive_seed, preserve_random_state, seed_all


def test_draws_depend_on_their_place_only() -> None:
    drawn = []
    for _ in range(2):
        seed_all(1, "a", 2)
        drawn.append((random.random(), np.random.rand(), float(torch.rand(()))))
    assert drawn[0] == drawn[1]


def test_different_places_have_different_seeds() -> None:
    places: list[tuple[int | str, ...]] = [(1, "a", 2), (1, "a", 3), (2, "a", 2), ("1a2",)]
    assert len({derive_seed(*place) for place in places}) == 4


def test_the_random_state_is_preserved() -> None:
    before = (random.getstate(), torch.get_rng_state())
    with preserve_random_state():
        seed_all(7)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
