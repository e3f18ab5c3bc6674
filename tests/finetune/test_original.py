"""The network that a converted one was made from."""

from __future__ import annotations

import pytest

import legocompress as lego
from legocompress.errors import UsageError
from legocompress.finetune.original import create_original
from tests.support.tiny import compressed, dense


def test_an_original_of_random_weights_cannot_be_created_again() -> None:
    model = dense()
    lego.convert_(model, lego.plan(model, lego.LegoSpec(allow_expansion=True)))
    with pytest.raises(UsageError, match="random, seed 0"):
        create_original(model)


def test_a_network_without_a_recorded_source_has_no_original() -> None:
    with pytest.raises(UsageError, match="--original"):
        create_original(compressed())
