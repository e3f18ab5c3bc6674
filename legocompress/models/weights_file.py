"""Read a file of weights safely, and list the state dicts that it holds."""

from __future__ import annotations

import argparse
import pickle  # whose error torch.load raises
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from legocompress.errors import WeightsError

# Weights may be wrapped this deep: {"ema": {"state": {"model": {name: tensor}}}}.
MAX_DEPTH = 3
MAX_LISTED = 8


@dataclass(frozen=True)
class StateDict:
    """Names and tensors of one mapping in a file; `keys` lead to it, none for the file itself."""

    keys: tuple[Any, ...]
    tensors: dict[str, Tensor]

    @property
    def rank(self) -> int:
        """2 for averages over training steps (EMA, SWA), 1 for plain weights.

        It is 0 for an AveragedModel of torch that has averaged no step: it holds the weights that
        training started from.
        """
        count = self.tensors.get("n_averaged")
        if count is not None:
            return 2 if count.numel() == 1 and bool(count > 0) else 0
        averaged = any(re.search(r"(^|[._-])(ema|swa)([._-]|$)", str(key)) for key in self.keys)
        return 2 if averaged else 1

    @property
    def label(self) -> str:
        """Where it is, for messages: 'model' for one key, ['ema']['module'] for several."""
        if len(self.keys) == 1:
            return repr(self.keys[0])
        return "".join(f"[{key!r}]" for key in self.keys) or "the names at the top"


def read_weights_file(path: Path) -> Any:
    """Read a safetensors file or a torch file of tensors and plain values; no code of it runs.

    Raises:
        WeightsError: the file is missing, damaged, or holds objects other than tensors, plain
            values and `argparse.Namespace` (the options of a training script, which are data).
    """
    if not path.is_file():
        raise WeightsError(f"weights file {str(path)!r} does not exist")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    # Damaged pickles raise any kind of error.
    except Exception as error:
        raise WeightsError(_explain_failure(path, error)) from error


def _explain_failure(path: Path, error: Exception) -> str:
    refused = re.search(r"(?:GLOBAL|global) (\w[\w.]*\.\w+)", str(error))
    if not isinstance(error, pickle.UnpicklingError) or refused is None:
        # torch puts a page of advice before the reason.
        reason = re.search(r"WeightsUnpickler error: *(\S.*)", str(error))
        text = reason[1] if reason else str(error).partition(" In PyTorch 2.6")[0]
        kind = type(error).__name__
        return (
            f"weights file {str(path)!r} cannot be read as safetensors or as a torch state dict of "
            f"plain tensors: {': '.join([kind, *text.splitlines()[:1]])[:300]}"
        )
    return (
        f"weights file {str(path)!r} holds more than plain tensors (such as {refused[1]}), which "
        "is not allowed, since loading it could run any code. If you trust the file, save its "
        f"state dict alone: torch.save(torch.load({str(path)!r}, weights_only=False)['state_dict'],"
        " 'weights.pth'), with the key that your file has, or with .state_dict() if it holds a "
        "whole model"
    )


def list_state_dicts(content: Any) -> list[StateDict]:
    """All mappings with tensors in a file's content, at most MAX_DEPTH deep, outer ones first."""
    return sorted(_walk(content, (), set()), key=lambda state: len(state.keys))


def _walk(value: Any, keys: tuple[Any, ...], visited: set[int]) -> Iterator[StateDict]:
    if not isinstance(value, Mapping) or id(value) in visited:
        return
    visited.add(id(value))
    tensors = {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if tensors:
        yield StateDict(keys, tensors)
    if len(keys) < MAX_DEPTH:
        for key, inner in value.items():
            yield from _walk(inner, (*keys, key), visited)


def describe_content(content: Any) -> str:
    """What a file holds at its top: keys with kinds and counts, such as "'model' (62 tensors)"."""
    if not isinstance(content, Mapping):
        return f"one value of type {type(content).__name__}"
    n_tensors = sum(isinstance(value, Tensor) for value in content.values())
    others = [(key, value) for key, value in content.items() if not isinstance(value, Tensor)]
    parts = [f"{n_tensors} tensors"] if n_tensors else []
    parts += [f"{str(key)[:60]!r} ({_describe(value)})" for key, value in others[:MAX_LISTED]]
    if len(others) > MAX_LISTED:
        parts.append(f"{len(others) - MAX_LISTED} more entries")
    return ", ".join(parts) or "nothing"


def _describe(value: Any) -> str:
    if not isinstance(value, Mapping):
        return type(value).__name__
    n_tensors = sum(isinstance(inner, Tensor) for inner in value.values())
    n_others = len(value) - n_tensors
    counts = [f"{n} {what}" for n, what in ((n_tensors, "tensors"), (n_others, "others")) if n]
    return f"{type(value).__name__} of {' and '.join(counts) or 'nothing'}"
