"""Record kernel calls once and replay them by one call of the library, in memory planned ahead.

Between two layers of a network Python takes about 10 microseconds, in which the library's other
threads wait. And maps that the allocator places anew each time take more memory than the maps that
are live at the same time.
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

# How many of each function's tensors are constants: they come first, and no call changes them.
# The order is that of the functions' numbers in lego_run (src/driver.cpp).
N_CONSTANTS = {
    "lego_conv2d": 2, "lego_max_pool2d": 0, "lego_means": 0, "lego_linear": 2, "lego_depthwise": 2,
    "lego_int8_conv": 1, "lego_int8_add": 0, "lego_int8_scale": 0, "lego_int8_table": 1,
    "lego_int8_copy": 0, "lego_int8_max_pool": 0, "lego_int8_mean": 0, "lego_int8_quantize": 0,
    "lego_int8_dequantize": 0, "lego_int8_linear": 4,
}  # fmt: skip
CACHE_LINE = 64  # bytes


@dataclass
class Buffer:
    """Memory that a recorded call writes first, and the calls between which it is live."""

    n_bytes: int
    first_call: int
    last_call: int


@dataclass(frozen=True)
class Location:
    """An address, as an offset in bytes from the start of a base.

    A base is an input or a buffer: bases 0 to n_inputs - 1 are the inputs, the next ones are the
    buffers in the order in which they were first written.
    """

    base: int
    offset: int


@dataclass
class Recorder:
    """Records kernel calls, and for each tensor of a call the location that it reads or writes.

    It keeps no tensor alive except the constants. `failure` is the reason why the calls cannot be
    replayed, for example because a call read memory whose location is not known.
    """

    inputs: Sequence[Tensor]
    calls: list[tuple[int, list[Location | int]]] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    constants: list[Tensor] = field(default_factory=list)
    failure: str | None = None
    # By the address of a storage: a reference to it, its base, and the address of the base.
    _storages: dict[int, tuple[StorageWeakRef, int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, x in enumerate(self.inputs):
            if x.untyped_storage().data_ptr() in self._storages:
                self.failure = "two inputs share their memory"
            self._add_base(x, number)

    def _add_base(self, tensor: Tensor, base: int) -> None:
        storage = tensor.untyped_storage()
        ref = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self._storages[storage.data_ptr()] = (ref, base, tensor.data_ptr())

    def locate(self, tensor: Tensor) -> Location | None:
        """The location of a tensor; None if it is neither an input nor written by a call."""
        entry = self._storages.get(tensor.untyped_storage().data_ptr())
        if entry is None or entry[0].expired():  # type: ignore[no-untyped-call]
            return None
        _, base, start = entry
        return Location(base, tensor.data_ptr() - start)

    def __call__(self, name: str, tensors: Sequence[Tensor | None], numbers: Sequence[int]) -> None:
        """Record a call that was made. The last of its tensors is its output."""
        if name not in N_CONSTANTS:
            self.failure = "a tape ran inside the recording"
            return
        words: list[Location | int] = []
        for i, tensor in enumerate(tensors):
            if tensor is None:
                words.append(0)
                continue
            if i < N_CONSTANTS[name]:
                self.constants.append(tensor)
                words.append(tensor.data_ptr())
                continue
            location = self.locate(tensor)
            if location is None and i == len(tensors) - 1:
                location = self._add_buffer(tensor)
            if location is None:
                self.failure = f"{name} read what no recorded call wrote"
                return
            if location.base >= len(self.inputs):
                self.buffers[location.base - len(self.inputs)].last_call = len(self.calls)
            words.append(location)
        self.calls.append((list(N_CONSTANTS).index(name), [*words, *numbers]))

    def _add_buffer(self, output: Tensor) -> Location | None:
        """Make the storage of a call's output a buffer that this call writes first."""
        self._add_base(output, len(self.inputs) + len(self.buffers))
        n_bytes = output.untyped_storage().nbytes()
        self.buffers.append(Buffer(n_bytes, len(self.calls), len(self.calls)))
        return self.locate(output)


@contextmanager
def recording(inputs: Sequence[Tensor]) -> Iterator[Recorder]:
    """Record the kernel calls that this thread makes on inputs and on what is computed from them.

    Args:
        inputs: tensors that must not share memory.
    """
    recorder = Recorder(inputs)
    token = LISTENER.set(recorder)
    try:
        yield recorder
    finally:
        LISTENER.reset(token)


def plan_arena(buffers: Sequence[Buffer]) -> tuple[list[int], int]:
    """Place buffers in one arena so that those that are live at the same time do not overlap.

    Largest first, each at the lowest offset that is free (greedy by size, Pisarchyk and Lee, 2020).

    Returns:
        The offset of each buffer, a multiple of CACHE_LINE; and the size of the arena. In bytes.
    """
    offsets = [0] * len(buffers)
    placed: list[int] = []
    for i in sorted(range(len(buffers)), key=lambda i: -buffers[i].n_bytes):
        buffer, offset = buffers[i], 0
        for j in sorted(placed, key=lambda j: offsets[j]):
            other = buffers[j]
            if other.last_call < buffer.first_call or buffer.last_call < other.first_call:
                continue
            if offset + buffer.n_bytes <= offsets[j]:
                break
            end = offsets[j] + other.n_bytes
            offset = max(offset, -(-end // CACHE_LINE) * CACHE_LINE)
        offsets[i] = offset
        placed.append(i)
    ends = (start + buffer.n_bytes for start, buffer in zip(offsets, buffers, strict=True))
    return offsets, max(ends, default=0)


_TAPES: weakref.WeakSet[Tape] = weakref.WeakSet()


def release_arenas() -> None:
    """Free the arenas that tapes keep between runs; the next run of a tape allocates a new one."""
    for tape in list(_TAPES):
        tape._idle.clear()


class Tape:
    """Replays recorded calls on inputs of the same sizes and strides.

    Buffers that hold no output share an arena, which is kept from run to run. Runs at the same time
    have one arena each.
    """

    def __init__(self, recorder: Recorder, outputs: Sequence[Tensor]) -> None:
        """Plan the memory and translate the calls to the words that `lego_run` reads.

        Args:
            recorder: the recorded calls.
            outputs: the tensors to return, computed from the recorder's inputs.

        Raises:
            KernelError: the location of a tensor is not known.
        """
        self._outputs = _locate_outputs(recorder, outputs)
        self._constants = recorder.constants
        n_inputs = len(recorder.inputs)
        output_bases = sorted({at.base for at, *_ in self._outputs if at.base >= n_inputs})
        # Floats of each buffer that holds an output, by its base.
        self._sizes = [(n, recorder.buffers[n - n_inputs].n_bytes // 4) for n in output_bases]
        inner = [i for i in range(len(recorder.buffers)) if n_inputs + i not in output_bases]
        offsets, self._arena_bytes = plan_arena([recorder.buffers[i] for i in inner])
        arena_offsets = {n_inputs + i: offset for i, offset in zip(inner, offsets, strict=True)}
        self._code: list[int] = []
        # Which words of the code are addresses: in the arena, and in inputs and outputs.
        self._arena_words: list[tuple[int, int]] = []
        self._outer_words: list[tuple[int, Location]] = []
        self._translate(recorder.calls, arena_offsets)
        self._idle: list[tuple[Tensor, ctypes.Array[ctypes.c_int64]]] = []
        _TAPES.add(self)

    def _translate(
        self, calls: Sequence[tuple[int, list[Location | int]]], arena_offsets: dict[int, int]
    ) -> None:
        """Write each call as the number of its function and the words of its struct."""
        for number, words in calls:
            self._code.append(number)
            for word in words:
                position = len(self._code)
                self._code.append(0 if isinstance(word, Location) else word)
                if isinstance(word, Location) and word.base in arena_offsets:
                    offset = arena_offsets[word.base] + word.offset
                    self._arena_words.append((position, offset))
                elif isinstance(word, Location):
                    self._outer_words.append((position, word))

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the calls.

        Returns:
            The outputs: new tensors, or inputs where a recorded call overwrote one.
        """
        try:
            arena, code = self._idle.pop()
        except IndexError:
            arena, code = self._allocate_arena()
        new = {base: torch.empty(size) for base, size in self._sizes}
        starts = {base: x.data_ptr() for base, x in enumerate(inputs)}
        starts.update((base, y.data_ptr()) for base, y in new.items())
        for position, at in self._outer_words:
            code[position] = starts[at.base] + at.offset
        call("lego_run", (), ctypes.addressof(code), len(code))
        self._idle.append((arena, code))
        results = []
        for at, shape, stride in self._outputs:
            base = new[at.base] if at.base in new else inputs[at.base]
            offset = base.storage_offset() + at.offset // 4
            results.append(base.as_strided(shape, stride, offset))
        return tuple(results)

    def _allocate_arena(self) -> tuple[Tensor, ctypes.Array[ctypes.c_int64]]:
        """A new arena, and a copy of the code with the addresses in it filled in."""
        arena = torch.empty(self._arena_bytes, dtype=torch.uint8)
        code = (ctypes.c_int64 * len(self._code))(*self._code)
        for position, offset in self._arena_words:
            code[position] = arena.data_ptr() + offset
        return arena, code


def _locate_outputs(
    recorder: Recorder, outputs: Sequence[Tensor]
) -> list[tuple[Location, torch.Size, tuple[int, ...]]]:
    """Location, shape and stride of each output; KernelError if the calls cannot be replayed."""
    located = []
    failure = recorder.failure
    for y in outputs:
        location = recorder.locate(y)
        if location is not None:
            located.append((location, y.shape, y.stride()))
        elif failure is None:
            failure = "an output was not made by a recorded call"
    if failure is not None:
        raise KernelError(f"the calls cannot be replayed: {failure}")
    return located
