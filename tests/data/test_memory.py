"""Memory of feature maps is reused in a scope, and returned to the system at its end."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from legocompress.data import memory
from legocompress.data.memory import reusing_memory

# In a process of its own: where an allocation has failed once, glibc gives the thread another
# arena, in which the largest buffers are mapped anew each time.
COUNT_FAULTS = """
import ctypes, resource, runpy, sys

reusing_memory = runpy.run_path(sys.argv[1])["reusing_memory"]
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def count_faults():
    # Page faults of writing to a buffer of 100 MB, the least of several times.
    faults = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        buffer = libc.malloc(100 << 20)
        ctypes.memset(buffer, 1, 100 << 20)
        libc.free(buffer)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(faults)

print(count_faults())
with reusing_memory(), reusing_memory():
    print(count_faults())
print(count_faults())
"""


@pytest.mark.skipif(memory._glibc() is None, reason="the C library is not glibc")
def test_a_buffer_is_reused_inside_and_mapped_anew_outside() -> None:
    command = [sys.executable, "-c", COUNT_FAULTS, memory.__file__]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    before, inside, after = map(int, printed.split())
    assert before >= 49  # at least one per huge page of 2 MB
    assert inside < 20
    assert after >= 49


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert memory._glibc.__wrapped__() is None
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    with reusing_memory():
        assert memory._users == 0
