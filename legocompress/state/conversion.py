"""What a conversion was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from legocompress.spec import LegoSpec


@dataclass(frozen=True)
class ConversionRecord:
    """What a conversion was asked for and what it left dense, stored as
    `lego_state(model).conversion`.

    `recipe` is what the network was fine-tuned by.
    """

    spec: LegoSpec
    seed: int
    skipped: dict[str, str]
    recipe: dict[str, Any] | None = None
