"""Noticing that somebody has written to an assembled weight, where the values would be lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

N_SAMPLES = 8  # values of a cached weight that are compared at each use


class WeightWatch:
    """Remembers an assembled weight that was given to other code.

    PyTorch counts the changes in place of each tensor. The counter of a weight that is not cached
    is remembered without its values, so that these can be freed. Writes through `.data` or NumPy
    are not counted: of a weight that is cached on the CPU, some values are compared, too.
    """

    def __init__(self, weight: Tensor, is_cached: bool) -> None:
        self.counter = weight.detach()  # shares the counter
        self._version = weight._version
        self._cached = weight if is_cached else None
        self._address = weight.data_ptr()
        self._sample: tuple[Tensor, Tensor] | None = None
        if not is_cached:
            self.counter.data = weight.new_empty(0)
        elif weight.device.type == "cpu":
            # A weight is dense: its memory is one range.
            step = max(1, (weight.numel() - 1) // (N_SAMPLES - 1))
            n_values = min(N_SAMPLES, weight.numel())
            view = self.counter.as_strided((n_values,), (step,), self.counter.storage_offset())
            self._sample = (view, view.clone())

    def is_of(self, weight: Tensor | None) -> bool:
        """Whether this watches a cached weight, or watches one that was not cached."""
        return self._cached is None or self._cached is weight

    def is_written(self) -> bool:
        """Whether the weight was changed in place since."""
        if self.counter._version != self._version:
            return True
        if self._cached is not None and self._cached.data_ptr() != self._address:
            return True
        return self._sample is not None and not torch.equal(*self._sample)


def can_watch(weight: Tensor) -> bool:
    """Whether PyTorch counts the changes of a weight."""
    return (
        type(weight) is Tensor
        and not weight.is_inference()
        and weight.device.type != "meta"
        and not is_functorch_wrapped_tensor(weight)
    )


def is_traced() -> bool:
    """Whether a compiler, an exporter or a dispatch mode follows what is computed now."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or torch._C._len_torch_dispatch_stack()
    )


class _Running(threading.local):
    depth = 0


_RUNNING = _Running()


@contextmanager
def running_own_code() -> Iterator[None]:
    """Mark that a layer computes, and may change the weight that it reads."""
    _RUNNING.depth += 1
    try:
        yield
    finally:
        _RUNNING.depth -= 1


def is_running_own_code() -> bool:
    """Whether a layer of this thread computes now."""
    return _RUNNING.depth > 0
