"""Peak memory is that of the call."""

from __future__ import annotations

import pytest
import torch

from legocompress.report.memory import peak_bytes


@pytest.mark.slow
def test_peak_memory_is_that_of_the_call() -> None:
    peak = peak_bytes(lambda: torch.ones(20_000_000).sum())
    if peak is None:
        pytest.skip("only Linux tells a process its peak memory")
    assert 0.9 * 80e6 < peak < 1.5 * 80e6
    assert peak_bytes(lambda: None) < 10e6
