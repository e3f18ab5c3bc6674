"""Memory of feature maps is reused in a scope, and returned to the system at its end."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from legocompress.data import memory
from legocompress.data.memory import reusing_memory

MEGABYTE = 1 << 20


def count_faults() -> int:
    """Page faults of writing to a buffer of 100 MB, the least of several times."""
    faults = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(25 * MEGABYTE)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(faults)


@pytest.mark.skipif(memory._glibc() is None, reason="the C library is not glibc")
def test_a_buffer_is_reused_inside_and_mapped_anew_outside() -> None:
    outside = count_faults()
    with reusing_memory(), reusing_memory():
        inside = count_faults()
    assert outside >= 49  # at least one per huge page of 2 MB
    assert inside < 20
    assert count_faults() >= 49


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert memory._glibc.__wrapped__() is None
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    with reusing_memory():
        assert memory._users == 0
