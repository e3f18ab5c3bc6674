"""Turn pydantic's validation errors into one line that lists every fault with its YAML path."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError

from legocompress.finetune.recipe import (
    Augment,
    Clip,
    Data,
    Distill,
    Ema,
    Mixup,
    Optimizer,
    Rates,
    Recipe,
    Schedule,
    Stage,
)

# The schema of each nested block, by the key that it stands under.
BLOCKS: dict[str, type[BaseModel]] = {
    "data": Data,
    "augment": Augment,
    "optimizer": Optimizer,
    "schedule": Schedule,
    "stages": Stage,
    "rates": Rates,
    "ema": Ema,
    "mixup": Mixup,
    "clip": Clip,
    "distill": Distill,
}


def explain_faults(error: ValidationError) -> str:
    """Every fault of a recipe as `path: what is wrong`, in one line."""
    faults = [_explain_fault(fault) for fault in error.errors() if not _is_consequence(fault)]
    count = f"{len(faults)} faults: " if len(faults) > 1 else ""
    return count + "; ".join(faults)


def _is_consequence(fault: Any) -> bool:
    """Whether a list is "too short" only because its entries are faulty and listed themselves."""
    return bool(fault["type"] == "too_short" and fault["input"])


def _explain_fault(fault: Any) -> str:
    path = ".".join(str(part) for part in fault["loc"])
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        message = f"unknown key; {_suggest_key(fault['loc'])}"
    elif fault["type"] == "missing":
        message = "is needed and not given"
    elif path and not isinstance(fault["input"], (dict, list)):
        message = f"{fault['input']!r}: {message[0].lower()}{message[1:]}"
    return f"{path}: {message}" if path else str(message)


def _suggest_key(location: tuple[int | str, ...]) -> str:
    """The allowed key that is most like an unknown one, else all that are allowed."""
    *parents, key = location
    blocks = [part for part in parents if isinstance(part, str)]
    allowed = sorted((BLOCKS[blocks[-1]] if blocks else Recipe).model_fields)
    similar = difflib.get_close_matches(str(key), allowed, n=1)
    return f"did you mean {similar[0]!r}?" if similar else f"allowed are {', '.join(allowed)}"
