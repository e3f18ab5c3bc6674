"""Limits on the network that a configuration from a file can make a library build."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from legocompress.errors import CheckpointError

MAX_VALUES = 4096  # in all arguments of a network together
MAX_TEXT = 1024  # characters per argument
MAX_NUMBER = 2**16  # per size: width, depth, image
MAX_SUM = 2**20  # of all sizes together
MAX_FACTOR = 64  # per argument that multiplies other sizes
MAX_CLASSES = 2**24
FACTORS = ("multiplier", "mult", "ratio", "factor", "scale", "expand", "expansion")


def check_arguments(arguments: dict[str, Any]) -> None:
    """Refuse arguments of a network that are too many, too large or too long.

    Raises:
        CheckpointError: an argument is outside the limits.
    """
    values = list(_leaves(arguments, "", 0))
    if len(values) > MAX_VALUES:
        raise CheckpointError(f"model_args has {len(values):,} values; {MAX_VALUES} are allowed")
    total = 0.0
    for key, value in values:
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise CheckpointError(f"model_args: {key} has {len(value):,} characters")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            limit = MAX_CLASSES if key == "num_classes" else MAX_NUMBER
            limit = MAX_FACTOR if key.lower().endswith(FACTORS) else limit
            if not abs(value) <= limit:
                raise CheckpointError(
                    f"model_args: {key} is {value:.3g}; at most {limit:,} is allowed"
                )
            total += 0 if key == "num_classes" else abs(value)
    if total > MAX_SUM:
        raise CheckpointError(f"model_args add up to {total:.3g}; at most {MAX_SUM:,} is allowed")


def _leaves(value: Any, key: str, depth: int) -> Iterator[tuple[str, Any]]:
    if depth > 16:
        raise CheckpointError(f"model_args: {key} is nested more than 16 deep")
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _leaves(part, str(name)[:100], depth + 1)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part, key, depth + 1)
    else:
        yield key, value


def check_input_size(cfg: dict[str, Any]) -> None:
    """Refuse an image size that no image has, before a report or an export allocates it.

    Raises:
        CheckpointError: it is not three sizes, or has more than 2**28 values.
    """
    for key in ("input_size", "test_input_size", "min_input_size"):
        size = cfg.get(key)
        if size is None:
            continue
        good = isinstance(size, list) and len(size) == 3
        good = good and all(type(n) is int and 0 < n <= MAX_NUMBER for n in size)
        if not good or math.prod(size) > 2**28:
            raise CheckpointError(f"pretrained_cfg: {key}={str(size)[:100]} is not an image size")


@contextmanager
def limit_construction(parts: int, numbers: int) -> Iterator[None]:
    """Stop the constructor of a network, in this thread, if it registers more than allowed.

    Args:
        parts: modules, parameters and buffers.
        numbers: elements of parameters and buffers.

    Raises:
        CheckpointError: from within the constructor.
    """
    thread = threading.get_ident()
    counted = {"parts": 0, "numbers": 0}

    def count(module: nn.Module, name: str, part: Any) -> None:
        if threading.get_ident() != thread:
            return
        counted["parts"] += 1
        counted["numbers"] += part.numel() if isinstance(part, Tensor) else 0
        if counted["parts"] > parts or counted["numbers"] > numbers:
            raise CheckpointError(
                f"the configuration builds a network of more than {parts:,} parts or {numbers:,} "
                "numbers, far more than its file holds"
            )

    with ExitStack() as hooks:
        for register in (
            register_module_module_registration_hook,
            register_module_parameter_registration_hook,
            register_module_buffer_registration_hook,
        ):
            hooks.callback(register(count).remove)  # type: ignore[operator]
        yield
