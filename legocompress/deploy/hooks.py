"""Whether anybody listens to the calls of a module: its hooks, and replaced forwards."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has forward hooks, or a `forward` of its own beside that of its class."""
    return any(_hook_dicts(module)) or "forward" in module.__dict__


def empty_hook_dicts(root: nn.Module, live: Collection[nn.Module]) -> list[Mapping[int, Any]]:
    """The hook dictionaries of a module's parts that are empty now.

    The module itself is left out, and so are the `live` modules, whose hooks are always heard.
    PyTorch fills these same dictionaries when a hook is registered later.
    """
    parts = (module for module in root.modules() if module is not root and module not in live)
    return [hooks for module in parts for hooks in _hook_dicts(module) if not hooks]


def _hook_dicts(module: nn.Module) -> tuple[Mapping[int, Any], Mapping[int, Any]]:
    return module._forward_hooks, module._forward_pre_hooks
