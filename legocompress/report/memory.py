"""Measure the peak memory of one call, as the operating system counts it.

This includes the scratch space of the kernels.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from legocompress.kernels import release_arenas


def measure_peak_bytes(call: Callable[[], object], repeats: int = 3) -> int | None:
    """Measure by how many bytes a call raises the resident memory of this process at its peak.

    Memory that the call keeps from one run to the next, such as packed weights, is allocated by a
    first run and does not count. The kernels' arenas of feature maps are released before each
    measured run, so they do count.

    Returns:
        The median over `repeats` runs, or None where the system does not report it (not Linux).
    """
    if sys.platform != "linux":
        return None
    try:
        trim = ctypes.CDLL(None).malloc_trim
        call()
        rises = []
        for _ in range(repeats):
            gc.collect()
            release_arenas()
            trim(0)  # otherwise the call could reuse freed memory, which would not show
            Path("/proc/self/clear_refs").write_text("5")
            before = _read_status("VmRSS")
            call()
            rises.append(_read_status("VmHWM") - before)
    except (OSError, AttributeError, KeyError):
        return None
    return max(0, int(statistics.median(rises)))


def _read_status(key: str) -> int:
    """Read an entry of /proc/self/status, in bytes; raises KeyError if there is none."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    return 1024 * int(values[key].split()[0])
