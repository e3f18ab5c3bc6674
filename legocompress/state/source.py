"""Where a network comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Library = Literal["timm", "torchvision"]


@dataclass(frozen=True)
class Source:
    """What rebuilds a network without its weights: library, architecture and arguments.

    `library` is None for a network that no library builds. `weights` is a text for the record.
    """

    library: Library | None
    architecture: str | None
    model_args: dict[str, Any] = field(default_factory=dict)
    weights: str = "unknown"
    reparameterized: bool = False
