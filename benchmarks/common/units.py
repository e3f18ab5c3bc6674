"""The Lego units that the fine-tuning benchmarks compare."""

from __future__ import annotations

from typing import Any

FOUR: dict[str, Any] = {"m": 0.5, "o": 2}  # 4x fewer parameters per layer
SIXTEEN: dict[str, Any] = {"m": 0.25, "o": 4}


def format_unit(unit: dict[str, Any]) -> str:
    """A unit as the tables name it, such as `m=0.5 o=2 k=1`."""
    return " ".join(f"{key}={value}" for key, value in unit.items())
