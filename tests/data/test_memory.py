"""Memory of feature maps is reused in a scope, and returned to the system at its end."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from legocompress.data import memory
from legocompress.data.memory import reusing_memory

MEGABYTE = 1 << 20


def count_faults(n_buffers: int, megabytes: int = 40) -> int:
    """Page faults of writing to some buffers, one after the other."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n_buffers):
        torch.ones(megabytes * MEGABYTE // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(memory._glibc() is None, reason="the C library is not glibc")
def test_a_buffer_is_reused_inside_and_mapped_anew_outside() -> None:
    with reusing_memory():
        count_faults(1, 60)  # larger, since an aligned buffer needs a gap larger than itself
        with reusing_memory():
            count_faults(1)
        inside = count_faults(3)
    outside = count_faults(3)
    assert inside < 50
    assert outside >= 3 * 40 / 2 - 5  # at least one fault per huge page of 2 MB


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert memory._glibc.__wrapped__() is None
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    with reusing_memory():
        assert memory._users == 0
