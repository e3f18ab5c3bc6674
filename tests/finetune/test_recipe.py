"""The schema: stages of epochs, and frozen values."""

from __future__ import annotations

from typing import Any

import pytest

from legocompress.finetune.recipe import Recipe, Stage
from tests.support.tiny import recipe


def test_the_stage_of_an_epoch() -> None:
    stages = [{"epochs": 2}, {"epochs": 1, "indices": "frozen"}]
    settings = recipe(stages=stages)
    assert settings.epochs == 3
    assert [settings.stage_of(e).indices for e in range(4)] == ["trained"] * 2 + ["frozen"] * 2


def test_recipes_are_frozen_values() -> None:
    settings = recipe()
    untyped: Any = settings
    with pytest.raises(ValueError):
        untyped.batch_size = 3
    assert Recipe(**settings.model_dump()) == settings
    assert Stage(epochs=1) == Stage(epochs=1)
