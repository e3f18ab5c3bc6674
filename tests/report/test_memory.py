"""The measured peak memory is that of the call."""

from __future__ import annotations

import pytest
import torch

from legocompress.report.memory import measure_peak_bytes


@pytest.mark.slow
def test_the_peak_is_what_the_call_allocates() -> None:
    peak = measure_peak_bytes(lambda: torch.ones(20_000_000).sum())
    if peak is None:
        pytest.skip("only Linux reports the peak memory of a process")
    assert 0.9 * 80e6 < peak < 1.5 * 80e6
    assert measure_peak_bytes(lambda: None) < 10e6
