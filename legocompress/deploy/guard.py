"""Noticing that a deployed module's own code would compute something else than its graph.

At each call the state of the module is compared with its state at deploy time. So that this costs
next to nothing, the dictionaries and tensors are listed once, and are then compared in few calls
that run at C speed. Only where these differ, the state is read anew and compared by name.
Tensors that have moved or were written to, but hold the values of deploy time, are no change.
"""

from __future__ import annotations

import ctypes
import hashlib
import operator
from collections import defaultdict
from collections.abc import Callable, Collection
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from legocompress.deploy.hooks import empty_hook_dicts
from legocompress.deploy.module_state import is_plain, walk_containers
from legocompress.lego.module import lego_modules

N_SAMPLES = 4  # values per tensor that are compared at each call
_version = operator.attrgetter("_version")
_requires_grad = operator.attrgetter("requires_grad")


class StateGuard:
    """Compares a module with what it was when the guard was made.

    Args:
        root: the module; its own hooks and its own `forward` do not count.
        live: modules that the graph calls as they are, so that a change in them needs no notice.
        name: the module's name in its network; '' for the root.
        on_move: called when tensors with the same values may be at other addresses than before.
    """

    def __init__(
        self,
        root: nn.Module,
        live: Collection[nn.Module] = frozenset(),
        name: str = "",
        on_move: Callable[[], None] = lambda: None,
    ) -> None:
        self._root, self._live, self._name, self._on_move = root, live, name, on_move
        self._empty_hooks = [
            *empty_hook_dicts(root, live),
            torch_module._global_forward_hooks,
            torch_module._global_forward_pre_hooks,
        ]
        self._deployed = _Snapshot(root, live)
        self._deployed.compute_digests()
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
            now.digests = self._deployed.digests
            self._deployed, self._changed = now, None
            self._on_move()
        else:
            change = f"{self._name}.{change}".removeprefix(".")
            self._changed = now, change
        return change


class _Snapshot:
    """The state of a module at one time."""

    def __init__(self, root: nn.Module, live: Collection[nn.Module]) -> None:
        containers = list(walk_containers(root, live))
        self.entries = dict(chain.from_iterable(c.entries() for c in containers))
        contents = [c.content for c in containers]
        self._empty = [content for content in contents if not content]
        self._dicts = [content for content in contents if content and isinstance(content, dict)]
        self._copies = list(map(dict.copy, self._dicts))
        self._others = [content for content in contents if not isinstance(content, dict)]
        self._other_copies = list(map(tuple, self._others))
        self._modules = list(root.modules())
        self._types = list(map(type, self._modules))
        self._classes: list[Any] = list(set(self._types))
        self._forwards = [kind.forward for kind in self._classes]
        self.digests: dict[str, bytes] = {}  # of the tensors' values, by path
        self._layers = list(lego_modules(root))
        self._list_tensors()

    def _list_tensors(self) -> None:
        named = {id(v): (path, v) for path, v in self.entries.items() if isinstance(v, Tensor)}
        self.tensors = [tensor for _, tensor in named.values()]
        # PyTorch counts the in-place changes of each tensor, but not of inference tensors.
        self._counted = [tensor for tensor in self.tensors if not tensor.is_inference()]
        # So are the assembled weights that were read. Reading them changes the layer's attributes.
        watches = [layer.watch for _, layer in self._layers]
        self._counted += [watch.counter for watch in watches if watch is not None]
        self._versions = list(map(_version, self._counted))
        self._plain = [tensor for tensor in self.tensors if _has_memory(tensor)]
        self._addresses = list(map(Tensor.data_ptr, self._plain))
        self._sizes = list(map(Tensor.numel, self._plain))
        samples = {path: MemorySample([t]) for path, t in named.values() if _has_memory(t)}
        self._marks = {path: _mark(t, samples.get(path)) for path, t in named.values()}
        # Other tensors of one value compare as numbers, so that their identity needs a look.
        self._single_values = [
            (content, key, value)
            for content in self._dicts
            for key, value in content.items()
            if isinstance(value, Tensor) and value.numel() == 1 and id(value) in named
        ]
        self._sample = MemorySample(self._plain)

    def is_current(self) -> bool:
        """Whether nothing at all has changed since, as far as can be seen."""
        try:
            # Looks at the identity of each value first.
            if self._dicts != self._copies or list(map(tuple, self._others)) != self._other_copies:
                return False
        except Exception:  # two tensors that are not the same object are compared as a whole
            return False
        if any(content.get(key) is not one for content, key, one in self._single_values):
            return False
        return (
            not any(self._empty)
            and list(map(_version, self._counted)) == self._versions
            and list(map(Tensor.data_ptr, self._plain)) == self._addresses
            and list(map(Tensor.numel, self._plain)) == self._sizes
            and self._sample.is_current()
            and list(map(type, self._modules)) == self._types
            and [kind.forward for kind in self._classes] == self._forwards
        )

    def difference(self, now: _Snapshot) -> str | None:
        """The path of one value that counts and is another now; None if there is none."""
        if self._types != now._types or self._forwards != [k.forward for k in self._classes]:
            return "the class of a part"
        for name, layer in now._layers:
            if layer.watch is not None and layer.watch.is_written():
                return f"{name}.weight".removeprefix(".")
        for path in {**self.entries, **now.entries}:
            if path not in self.entries or path not in now.entries:
                return path
            before, after = self.entries[path], now.entries[path]
            if not _is_same(before, after) and not self._holds_same_values(path, after):
                return path
        for path, mark in self._marks.items():
            if now._marks.get(path) != mark and not self._holds_same_values(
                path, now.entries[path]
            ):
                return path
        return None

    def compute_digests(self) -> None:
        """Remember the values of all tensors in the memory of the CPU."""
        for path, value in self.entries.items():
            digest = _compute_digest(value)
            if digest is not None:
                self.digests[path] = digest

    def _holds_same_values(self, path: str, now: Any) -> bool:
        """Whether an entry is a tensor of the layout and the values that were remembered."""
        digest = self.digests.get(path)
        return digest is not None and _compute_digest(now) == digest


def _is_same(before: Any, now: Any) -> bool:
    """Whether two values are one object, or equal numbers, or containers (compared by content)."""
    if before is now:
        return True
    if type(before) is not type(now):
        return False
    if isinstance(before, (dict, list, set)):
        return True
    return bool(is_plain(before) and before == now)


def _compute_digest(value: Any) -> bytes | None:
    """A hash of a plain tensor's type, layout and values; None where these cannot be read."""
    if not isinstance(value, Tensor) or not _has_memory(value) or value.device.type != "cpu":
        return None
    kind = (type(value), value.dtype, value.shape, value.stride(), value.is_conj(), value.is_neg())
    digest = hashlib.blake2b(repr(kind).encode(), digest_size=16)
    values = value.detach().contiguous()
    n_bytes = values.numel() * values.element_size()
    if n_bytes:
        digest.update((ctypes.c_char * n_bytes).from_address(values.data_ptr()))
    return digest.digest()


def _mark(tensor: Tensor, sample: MemorySample | None) -> tuple[Any, ...]:
    return (
        None if tensor.is_inference() else tensor._version,
        tensor.data_ptr() if _has_memory(tensor) else None,
        tensor.shape,
        None if sample is None else sample.read(),
    )


def _has_memory(tensor: Tensor) -> bool:
    is_plain_tensor = type(tensor) in (Tensor, nn.Parameter)
    return is_plain_tensor and tensor.layout is torch.strided and tensor.device.type != "meta"


class MemorySample:
    """Up to `N_SAMPLES` values of each of some tensors on the CPU, evenly spread.

    One call of NumPy reads the values of all tensors by their addresses. The tensors' memory is
    kept, so that it is valid and no other tensor gets the same address.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._memory = [tensor.detach() for tensor in tensors]
        addresses: dict[tuple[int, int], list[int]] = defaultdict(list)
        for tensor in tensors:
            if tensor.device.type == "cpu" and tensor.numel():
                steps = zip(tensor.shape, tensor.stride(), strict=True)
                span = sum((n - 1) * step for n, step in steps) + 1
                first, size = tensor.data_ptr(), tensor.element_size()
                places = range(0, span, max(1, (span - 1) // (N_SAMPLES - 1)))[:N_SAMPLES]
                addresses[size, first % size] += [first + place * size for place in places]
        self._parts = [_memory_at(size, places) for (size, _), places in addresses.items()]
        self._values = self.read()

    def read(self) -> list[bytes]:
        """The bytes of the values now."""
        return [memory.take(places).tobytes() for memory, places in self._parts]

    def is_current(self) -> bool:
        """Whether the values are what they were."""
        return self.read() == self._values


def _memory_at(size: int, addresses: list[int]) -> tuple[Any, Any]:
    """An array over all addresses, of values of `size` bytes, and the places of these in it."""
    first = min(addresses)
    n_values = (max(addresses) - first) // size + 1
    buffer: Any = (ctypes.c_char * (n_values * size)).from_address(first)
    places = (np.array(addresses) - first) // size
    return np.frombuffer(buffer, dtype=f"V{size}" if size > 8 else f"u{size}"), places
