"""Recording kernel calls, and replaying them in planned memory."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from legocompress import kernels
from legocompress.errors import KernelError
from legocompress.kernels import Tape, recording
from legocompress.kernels.library import call
from legocompress.kernels.tape import CACHE_LINE, Buffer, plan_arena
from tests.support.kernel_cases import compiled, make_case

SAME = ((1, 1), (1, 1), (1, 1))
UNIT = make_case(n=6, c=6)
PACKED = kernels.pack(UNIT.shape, UNIT.lego_filters, UNIT.index, UNIT.coefficients)
X = torch.randn(2, 6, 9, 11)


def conv(x: Tensor, residual: Tensor | None = None, overwrite: bool = False) -> Tensor:
    return kernels.lego_conv2d(x, PACKED, UNIT.bias, residual, *SAME, "relu", overwrite)


def block(x: Tensor) -> tuple[Tensor, ...]:
    """Convs, the last of which overwrites the first one's output, then pooling and a mean."""
    first = conv(x)
    total = conv(conv(conv(first)), first, True)
    pooled = kernels.max_pool2d(total, (2, 2), (2, 2), (0, 0), (1, 1))
    return kernels.global_mean(pooled).flatten(1), pooled


def record_tape(run: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> Tape:
    """Record the kernel calls of run(*inputs)."""
    with torch.no_grad(), recording(inputs) as recorder:
        return Tape(recorder, run(*inputs))


def test_buffers_that_are_live_at_once_do_not_overlap() -> None:
    rnd = random.Random(0)
    for _ in range(200):
        firsts = [rnd.randrange(20) for _ in range(rnd.randrange(1, 15))]
        buffers = [Buffer(rnd.randrange(1, 999), i, i + rnd.randrange(6)) for i in firsts]
        offsets, size = plan_arena(buffers)
        ends = [at + buffer.n_bytes for at, buffer in zip(offsets, buffers, strict=True)]
        spans = list(zip(offsets, ends, buffers, strict=True))
        assert size == max(ends)
        assert all(at % CACHE_LINE == 0 for at in offsets)
        for i, (low, high, buffer) in enumerate(spans):
            for other_low, other_high, other in spans[:i]:
                starts_before_end = buffer.first_call <= other.last_call
                live_at_once = starts_before_end and other.first_call <= buffer.last_call
                assert not live_at_once or high <= other_low or other_high <= low
    chain = [Buffer(640, i, i + 1) for i in range(10)]
    assert plan_arena(chain)[1] == 1280  # two are live at a time
    assert plan_arena([]) == ([], 0)


@compiled
def test_a_replay_gives_the_same_bits_in_new_memory() -> None:
    tape = record_tape(block, X)
    before = X.clone()
    with torch.no_grad():
        for x in (X, torch.randn_like(X), torch.randn(4, 6, 9, 11)[1:3]):
            again, expected = tape(x), block(x)
            assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
            copies = [y.clone() for y in again]
            tape(-x)
            assert all(torch.equal(a, b) for a, b in zip(again, copies, strict=True))
    assert torch.equal(X, before)


@compiled
def test_the_arena_is_kept_until_it_is_released() -> None:
    tape = record_tape(block, X)
    with torch.no_grad():
        tape(X)
        ((arena, _),) = tape._idle
        tape(X)
        assert tape._idle[0][0] is arena
        kernels.release_arenas()
        assert not tape._idle
        assert torch.equal(tape(X)[0], block(X)[0])


@compiled
def test_an_input_that_is_overwritten_is_the_output() -> None:
    def run(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        return (conv(conv(x), residual, True),)

    tape = record_tape(run, X, torch.randn_like(X))
    with torch.no_grad():
        residual = torch.randn(3, *X.shape)[1]
        expected = run(X, residual.clone())[0]
        (y,) = tape(X, residual)
    assert torch.equal(y, expected)
    assert y.data_ptr() == residual.data_ptr()


@compiled
def test_replays_at_the_same_time() -> None:
    tape = record_tape(block, X)
    failed_seeds: list[int] = []

    def work(seed: int) -> None:
        x = torch.randn(X.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            expected = block(x)
            for _ in range(50):
                if not all(torch.equal(a, b) for a, b in zip(tape(x), expected, strict=True)):
                    failed_seeds.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed_seeds


@compiled
def test_calls_that_cannot_be_replayed_are_refused() -> None:
    with pytest.raises(KernelError, match="read what no recorded call wrote"):
        record_tape(lambda x: (conv(conv(x) + 1),), X)
    with pytest.raises(KernelError, match="an output was not made"):
        record_tape(lambda x: (conv(x) + 1,), X)
    with pytest.raises(KernelError, match="share their memory"):
        record_tape(lambda x, y: (conv(x, y),), X, X)

    inner = record_tape(lambda x: (conv(x),), X)
    with pytest.raises(KernelError, match="a tape ran inside"):
        record_tape(inner, X)

    def reused(x: Tensor) -> tuple[Tensor, ...]:
        # The allocator may place another tensor where a map was.
        address = conv(x).data_ptr()
        for _ in range(100):
            other = torch.randn_like(x)
            if other.data_ptr() == address:
                break
        return (conv(other),)

    with pytest.raises(KernelError, match="read what no recorded call wrote"):
        record_tape(reused, X)


@compiled
def test_damaged_code_is_refused() -> None:
    code = torch.tensor([7, 0, 0])
    for words in (3, 1):
        with pytest.raises(KernelError, match="sizes of the call"):
            call("lego_run", (code,), words)
        code = torch.tensor([0, 0, 0])
