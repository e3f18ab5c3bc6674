"""Everything that a module's own code reads from itself: attributes, tensors, lists and dicts."""

from __future__ import annotations

import types
from collections.abc import Collection, Iterator
from dataclasses import dataclass, is_dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from legocompress.lego.module import LegoModule
from legocompress.lego.surgery import Replacement
from legocompress.state.model_state import NAME as LEGO_STATE

MAX_DEPTH = 4  # of lists and dicts in each other
# What nn.Module itself holds: registries and dictionaries of hooks.
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
INNER_DICTS = _OF_EVERY_MODULE - {"training"}
_REGISTRIES = ("_parameters", "_buffers", "_modules")
# A forward pass without gradients does not read these; `train` drops a frozen weight.
_IGNORED = frozenset({
    LEGO_STATE, "_watch", "_is_full_backward_hook", "weight_error", "storage_dtype",
    "coefficients_dtype",
})  # fmt: skip
_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum)
_WITHOUT_STATE = (
    *_PLAIN, Tensor, nn.Module, Replacement, type, types.ModuleType, types.FunctionType,
    types.MethodType, types.BuiltinFunctionType,
)  # fmt: skip


@dataclass(frozen=True)
class Container:
    """One dictionary, list, set or tuple that a module's own code may read.

    `name` is its path from the root, and `ignored` are the keys that do not count.
    """

    name: str
    content: Collection[Any]
    ignored: frozenset[str] = frozenset()

    def entries(self) -> Iterator[tuple[str, Any]]:
        """The values that count, by path."""
        if isinstance(self.content, dict):
            for key, value in self.content.items():
                if key not in self.ignored:
                    yield f"{self.name}.{key}".removeprefix("."), value
        else:
            for place, value in enumerate(self.content):
                yield f"{self.name}[{place}]", value


def walk_containers(
    root: nn.Module, live: Collection[nn.Module] = frozenset()
) -> Iterator[Container]:
    """All containers below a module.

    Args:
        root: the module; its own `forward` does not count.
        live: modules that always run as they are, so that only their tensors and children count.
    """
    for name, module in root.named_modules():
        for registry in _REGISTRIES:
            yield Container(name, module.__dict__[registry], _ignored_entries(module, registry))
        if module not in live:
            ignored = _IGNORED | {"forward"} if module is root else _IGNORED
            yield Container(name, module.__dict__, ignored)
            for key, value in list(module.__dict__.items()):
                if key not in _OF_EVERY_MODULE and key not in ignored:
                    yield from _nested(f"{name}.{key}".removeprefix("."), value)


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a text or the like, or a tuple of them."""
    if isinstance(value, tuple):
        return all(map(is_plain, value))
    return isinstance(value, _PLAIN)


def _ignored_entries(module: nn.Module, registry: str) -> frozenset[str]:
    """The parameters or buffers that a forward pass in eval mode does not read."""
    if registry == "_buffers" and isinstance(module, LegoModule):
        return frozenset({"frozen_weight"})
    if registry == "_buffers" and isinstance(module, _NormBase):
        return frozenset({"num_batches_tracked"})
    return frozenset()


def _nested(name: str, value: Any, depth: int = 0) -> Iterator[Container]:
    """The container that a value is, with those in it; of another object, its attributes."""
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, (list, set, tuple)):
        items = enumerate(value)
    else:
        if depth == 0 and _has_attributes(value):
            yield Container(name, vars(value))
        return
    if depth > MAX_DEPTH or is_plain(value):
        return
    yield Container(name, value)
    for key, part in list(items):
        yield from _nested(f"{name}[{key!r}]", part, depth + 1)


def _has_attributes(value: Any) -> bool:
    if isinstance(value, _WITHOUT_STATE) or not isinstance(getattr(value, "__dict__", 0), dict):
        return False
    kind: Any = type(value)
    return not (is_dataclass(value) and kind.__dataclass_params__.frozen)


class AttributeRecord:
    """What the containers of a module held at one time, to find what changed and to undo it."""

    def __init__(self, root: nn.Module) -> None:
        self._copies = [
            (container, type(container.content)(container.content))  # type: ignore[call-arg]
            for container in walk_containers(root)
            if isinstance(container.content, (dict, list, set))
        ]

    def restore_(self) -> list[str]:
        """Undo all changes; return the paths of what had changed."""
        changed: list[str] = []
        for container, copied in self._copies:
            before = dict(Container(container.name, copied, container.ignored).entries())
            now = dict(container.entries())
            different = [
                path
                for path in {**before, **now}
                if path not in before or path not in now or before[path] is not now[path]
            ]
            if different:
                changed += different
                content: Any = container.content
                content.clear()
                content.extend(copied) if isinstance(content, list) else content.update(copied)
        return changed
