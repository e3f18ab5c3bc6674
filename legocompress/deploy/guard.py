"""Noticing that a deployed module's own code would compute something else than its graph.

At each call the state of the module is compared with its state at deploy time. So that this costs
next to nothing, the values that count are listed once, and are then compared in few calls that run
at C speed. Only where these differ, the state is read anew and compared by name.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Collection
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from legocompress.deploy.hooks import empty_hook_dicts
from legocompress.deploy.module_state import is_plain, walk_containers

N_SAMPLES = 16  # values per tensor that are compared at each call
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_version = operator.attrgetter("_version")
_requires_grad = operator.attrgetter("requires_grad")
_shape = operator.attrgetter("shape")


class StateGuard:
    """Compares a module with what it was when the guard was made.

    Args:
        root: the module; its own hooks and its own `forward` do not count.
        live: modules that the graph calls as they are, so that a change in them needs no notice.
    """

    def __init__(self, root: nn.Module, live: Collection[nn.Module]) -> None:
        self._root, self._live = root, live
        self._empty_hooks = [
            *empty_hook_dicts(root, live),
            torch_module._global_forward_hooks,
            torch_module._global_forward_pre_hooks,
        ]
        self._deployed = _Snapshot(root, live)
        self._changed: tuple[_Snapshot, str] | None = None  # the latest other state, and its fault

    def has_new_hooks(self) -> bool:
        """Whether hooks are registered, on a part or on all modules, that the graph would skip."""
        return any(self._empty_hooks)

    def needs_gradients(self) -> bool:
        """Whether a parameter of the module needs a gradient."""
        return any(map(_requires_grad, self._deployed.tensors))

    def find_change(self) -> str | None:
        """Say what has changed, such as 'norm1.eps'; None if nothing that counts has."""
        if self._deployed.is_current():
            return None
        if self._changed is not None and self._changed[0].is_current():
            return self._changed[1]
        now = _Snapshot(self._root, self._live)
        change = self._deployed.difference(now)
        if change is None:
            self._deployed, self._changed = now, None
        else:
            self._changed = now, change
        return change


class _Snapshot:
    """The state of a module at one time."""

    def __init__(self, root: nn.Module, live: Collection[nn.Module]) -> None:
        containers = list(walk_containers(root, live))
        self.entries = dict(chain.from_iterable(c.entries() for c in containers))
        contents = [container.content for container in containers]
        self._dicts = [content for content in contents if content and isinstance(content, dict)]
        self._others = [content for content in contents if content and not isinstance(content, dict)]
        self._empty = [content for content in contents if not content]
        self._values = self._read_values()
        self._modules = list(root.modules())
        self._types = list(map(type, self._modules))
        self._classes = list(set(self._types))
        self._forwards = [kind.forward for kind in self._classes]
        self._list_tensors()

    def _list_tensors(self) -> None:
        named = {id(v): (path, v) for path, v in self.entries.items() if isinstance(v, Tensor)}
        self.tensors = [tensor for _, tensor in named.values()]
        # PyTorch counts the in-place changes of each tensor, but not of inference tensors.
        self._counted = [tensor for tensor in self.tensors if not tensor.is_inference()]
        self._versions = list(map(_version, self._counted))
        self._plain = [tensor for tensor in self.tensors if _has_memory(tensor)]
        self._addresses = list(map(Tensor.data_ptr, self._plain))
        self._shapes = list(map(_shape, self._plain))
        samples = {path: _sample(t) for path, t in named.values() if _has_memory(t)}
        # The samples share the tensors' memory, so that no other tensor gets the same address.
        by_dtype: dict[Any, list[Any]] = defaultdict(list)
        for sample in samples.values():
            if sample is not None:
                by_dtype[sample.dtype].append(sample)
        self._samples = list(by_dtype.values())
        self._sampled = self._read_samples()
        self._marks = {path: self._mark(t, samples.get(path)) for path, t in named.values()}
        self._memory = [tensor.detach() for tensor in self._plain]

    def _mark(self, tensor: Tensor, sample: Any) -> tuple[Any, ...]:
        return (
            None if tensor.is_inference() else tensor._version,
            tensor.data_ptr() if _has_memory(tensor) else None,
            tensor.shape,
            None if sample is None else sample.tobytes(),
        )

    def _read_values(self) -> list[Any]:
        return [
            *chain.from_iterable(map(dict.values, self._dicts)),
            *chain.from_iterable(self._others),
        ]

    def _read_samples(self) -> list[bytes]:
        return [np.concatenate(samples).tobytes() for samples in self._samples]

    def is_current(self) -> bool:
        """Whether nothing at all has changed since, as far as can be seen."""
        try:
            if self._read_values() != self._values:  # looks at the identity of each value first
                return False
        # Two tensors that are not the same object cannot be compared as a whole.
        except Exception:
            return False
        return (
            not any(self._empty)
            and list(map(_version, self._counted)) == self._versions
            and list(map(Tensor.data_ptr, self._plain)) == self._addresses
            and list(map(_shape, self._plain)) == self._shapes
            and self._read_samples() == self._sampled
            and list(map(type, self._modules)) == self._types
            and [kind.forward for kind in self._classes] == self._forwards
        )

    def difference(self, now: _Snapshot) -> str | None:
        """The path of one value that counts and is another now; None if there is none."""
        if self._types != now._types or self._forwards != [k.forward for k in self._classes]:
            return "the class of a part"
        for path in {**self.entries, **now.entries}:
            if path not in self.entries or path not in now.entries:
                return path
            if not _is_same(self.entries[path], now.entries[path]):
                return path
        changed = (path for path, mark in self._marks.items() if now._marks.get(path) != mark)
        return next(changed, None)


def _is_same(before: Any, now: Any) -> bool:
    """Whether two values are one object, or equal numbers, or containers (compared by content)."""
    if before is now:
        return True
    if type(before) is not type(now):
        return False
    if isinstance(before, (dict, list, set)):
        return True
    return bool(is_plain(before) and before == now)


def _has_memory(tensor: Tensor) -> bool:
    is_plain_tensor = type(tensor) in (Tensor, nn.Parameter)
    return is_plain_tensor and tensor.layout is torch.strided and tensor.device.type != "meta"


def _sample(tensor: Tensor) -> Any:
    """Up to `N_SAMPLES` values of a tensor on the CPU, evenly spread, as integers.

    The array shares the tensor's memory. None where the tensor is empty or not on the CPU.
    """
    if tensor.device.type != "cpu" or not tensor.numel():
        return None
    values = tensor.detach()
    values = torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
    span = sum((n - 1) * step for n, step in zip(values.shape, values.stride(), strict=True)) + 1
    flat = values.as_strided((span,), (1,))
    flat = flat.view(_INTEGERS[flat.element_size()])
    return flat[:: max(1, (span - 1) // (N_SAMPLES - 1))][:N_SAMPLES].numpy()
