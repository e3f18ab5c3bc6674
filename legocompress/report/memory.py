"""Peak memory of one call, as the operating system counts it: kernels' scratch space included."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from legocompress.kernels import release_arenas


def peak_bytes(call: Callable[[], object], repeats: int = 3) -> int | None:
    """How far a call raises the resident memory of this process at its highest; None off Linux.

    What the call keeps from one run to the next (packed weights) counts before it, not in it; but
    the kernels' arenas of maps are given back before.
    """
    if sys.platform != "linux":
        return None
    try:
        trim = ctypes.CDLL(None).malloc_trim
        call()
        found = []
        for _ in range(repeats):
            gc.collect()
            release_arenas()
            trim(0)  # else the call could use what earlier ones have freed, unseen
            Path("/proc/self/clear_refs").write_text("5")
            before = _status("VmRSS")
            call()
            found.append(_status("VmHWM") - before)
    except (OSError, AttributeError, KeyError):
        return None
    return max(0, int(statistics.median(found)))


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    return 1024 * int(values[key].split()[0])
