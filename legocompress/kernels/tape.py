"""Kernel calls, recorded once and run again by one call of the library in memory planned ahead.

Between two layers of a network Python takes some 10 microseconds, in which the library's other
threads wait; and maps that the allocator places anew each time take more memory than those that
live at once.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from legocompress.errors import KernelError
from legocompress.kernels.library import LISTENER, call

# In the order of their numbers in lego_run: how many tensors come first that no call changes.
CONSTANTS = {
    "lego_conv2d": 2, "lego_max_pool2d": 0, "lego_means": 0, "lego_linear": 2, "lego_depthwise": 2,
}  # fmt: skip
LINE = 64  # bytes


@dataclass
class Buffer:
    """Memory that a call writes first: its bytes, and the calls from and up to which it lives."""

    n_bytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Place:
    """Bytes after the start of an input, or of a buffer, which are counted on after the inputs."""

    number: int
    offset: int


@dataclass
class Recorder:
    """Notes the kernels' calls on some inputs, and where each of them reads and writes.

    No tensor is kept but the constants: `fault` tells where that leaves an address unknown.
    """

    inputs: Sequence[Tensor]
    calls: list[tuple[int, list[Place | int]]] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    constants: list[Tensor] = field(default_factory=list)
    fault: str | None = None
    _known: dict[int, tuple[StorageWeakRef, int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, x in enumerate(self.inputs):
            if x.untyped_storage().data_ptr() in self._known:
                self.fault = "two inputs share their memory"
            self._learn(x, number, x.data_ptr())

    def _learn(self, tensor: Tensor, number: int, start: int) -> None:
        storage = tensor.untyped_storage()
        ref = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self._known[storage.data_ptr()] = (ref, number, start)

    def place(self, tensor: Tensor) -> Place | None:
        """Where a tensor lies; None where no input and no call has put it there."""
        known = self._known.get(tensor.untyped_storage().data_ptr())
        if known is None or known[0].expired():  # type: ignore[no-untyped-call]
            return None
        _, number, start = known
        return Place(number, tensor.data_ptr() - start)

    def __call__(self, name: str, tensors: Sequence[Tensor | None], numbers: Sequence[int]) -> None:
        """Note a call that was made."""
        if name not in CONSTANTS:
            self.fault = "a tape ran inside of them"
            return
        n_constants = CONSTANTS[name]
        words: list[Place | int] = []
        for i, tensor in enumerate(tensors):
            if tensor is None:
                words.append(0)
                continue
            if i < n_constants:
                self.constants.append(tensor)
                words.append(tensor.data_ptr())
                continue
            place = self.place(tensor)
            if place is None and i == len(tensors) - 1:
                self._learn(tensor, len(self.inputs) + len(self.buffers), tensor.data_ptr())
                size = tensor.untyped_storage().nbytes()
                self.buffers.append(Buffer(size, len(self.calls), len(self.calls)))
                place = self.place(tensor)
            if place is None:
                self.fault = f"{name} read what no recorded call wrote"
                return
            if place.number >= len(self.inputs):
                self.buffers[place.number - len(self.inputs)].last = len(self.calls)
            words.append(place)
        self.calls.append((list(CONSTANTS).index(name), [*words, *numbers]))


@contextmanager
def recording(inputs: Sequence[Tensor]) -> Iterator[Recorder]:
    """Record the kernels' calls of this thread on inputs and on what is made of them."""
    recorder = Recorder(inputs)
    token = LISTENER.set(recorder)
    try:
        yield recorder
    finally:
        LISTENER.reset(token)


def planned(buffers: Sequence[Buffer]) -> tuple[list[int], int]:
    """Offsets of buffers in one arena, and its bytes; those that live at once do not overlap.

    The largest first, each as low as there is room (Pisarchyk and Lee, 2020, greedy by size).
    """
    offsets = [0] * len(buffers)
    placed: list[int] = []
    for i in sorted(range(len(buffers)), key=lambda i: -buffers[i].n_bytes):
        one, low = buffers[i], 0
        for j in sorted(placed, key=lambda j: offsets[j]):
            other = buffers[j]
            if other.last < one.first or one.last < other.first:
                continue
            if low + one.n_bytes <= offsets[j]:
                break
            low = max(low, -(-(offsets[j] + other.n_bytes) // LINE) * LINE)
        offsets[i] = low
        placed.append(i)
    ends = (offset + one.n_bytes for offset, one in zip(offsets, buffers, strict=True))
    return offsets, max(ends, default=0)


_TAPES: weakref.WeakSet[Tape] = weakref.WeakSet()


def release_arenas() -> None:
    """Give back the memory that tapes keep between runs; the next run of each takes it anew."""
    for tape in list(_TAPES):
        tape._idle.clear()


class Tape:
    """Runs what was recorded, on inputs of the same sizes and strides.

    Maps that do not come out share an arena, which is kept from run to run; runs at the same time
    have one each.
    """

    def __init__(self, recorder: Recorder, outputs: Sequence[Tensor]) -> None:
        """Plan the memory.

        Args:
            recorder: of the calls.
            outputs: what was made of its inputs.

        Raises:
            KernelError: some tensor lies where no recorded call put it.
        """
        places = [recorder.place(y) for y in outputs]
        fault = recorder.fault
        if fault is None and None in places:
            fault = "an output was not made by a recorded call"
        if fault is not None:
            raise KernelError(f"the calls cannot be run again: {fault}")
        n_inputs = len(recorder.inputs)
        self._constants = recorder.constants
        self._outputs = [
            (place, y.shape, y.stride())
            for y, place in zip(outputs, places, strict=True)
            if place is not None
        ]
        outer = sorted({place.number for place, *_ in self._outputs if place.number >= n_inputs})
        self._sizes = [(n, recorder.buffers[n - n_inputs].n_bytes // 4) for n in outer]
        inner = [i for i in range(len(recorder.buffers)) if n_inputs + i not in outer]
        offsets, self._arena = planned([recorder.buffers[i] for i in inner])
        at = {n_inputs + i: offset for i, offset in zip(inner, offsets, strict=True)}
        self._code: list[int] = []
        self._inside: list[tuple[int, int]] = []  # words that are so many bytes into the arena
        self._outside: list[tuple[int, Place]] = []  # and those of inputs and outputs
        for number, words in recorder.calls:
            self._code.append(number)
            for word in words:
                here = len(self._code)
                self._code.append(0 if isinstance(word, Place) else word)
                if isinstance(word, Place) and word.number in at:
                    self._inside.append((here, at[word.number] + word.offset))
                elif isinstance(word, Place):
                    self._outside.append((here, word))
        self._idle: list[tuple[Tensor, ctypes.Array[ctypes.c_int64]]] = []
        _TAPES.add(self)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the calls; the outputs are new tensors, or inputs that were overwritten."""
        try:
            arena, code = self._idle.pop()
        except IndexError:
            arena, code = self._instance()
        made = {number: torch.empty(size) for number, size in self._sizes}
        starts = {i: x.data_ptr() for i, x in enumerate(inputs)}
        starts.update((number, y.data_ptr()) for number, y in made.items())
        for word, place in self._outside:
            code[word] = starts[place.number] + place.offset
        call("lego_run", (), ctypes.addressof(code), len(code))
        self._idle.append((arena, code))
        results = []
        for place, shape, stride in self._outputs:
            base = made.get(place.number)
            base = inputs[place.number] if base is None else base
            offset = base.storage_offset() + place.offset // 4
            results.append(base.as_strided(shape, stride, offset))
        return tuple(results)

    def _instance(self) -> tuple[Tensor, ctypes.Array[ctypes.c_int64]]:
        arena = torch.empty(self._arena, dtype=torch.uint8)
        code = (ctypes.c_int64 * len(self._code))(*self._code)
        for word, offset in self._inside:
            code[word] = arena.data_ptr() + offset
        return arena, code
