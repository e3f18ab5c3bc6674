"""Rounding to the storage dtypes."""

from __future__ import annotations

import torch

from legocompress.lego.storage import round_to_storage


def test_rounding_keeps_what_is_finite_finite() -> None:
    values = torch.tensor([1e9, -1e9, 1 / 3, 0.0, 65504.0])
    for memory in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        for size in (1e-3, 1, 1e3):
            wide = (torch.randn(500, 9, dtype=torch.float64) * size).to(memory)
            once = round_to_storage(wide, "int8")
            assert torch.equal(round_to_storage(once, "int8"), once)
            step = wide.abs().amax(1, keepdim=True) / 127
            assert bool(((once - wide).abs() <= 1.3 * step).all())
        widest = torch.full((2, 3), torch.finfo(memory).max, dtype=memory)
        assert bool(round_to_storage(widest, "int8").isfinite().all())
        assert torch.equal(round_to_storage(0 * widest, "int8"), 0 * widest)
    half = round_to_storage(values, "fp16")
    assert half.tolist() == [65504.0, -65504.0, float(torch.tensor(1 / 3).half()), 0.0, 65504.0]
    assert half.dtype == torch.float32
    largest = torch.finfo(torch.float32).max
    assert bool(round_to_storage(torch.tensor([largest, -largest]), "bf16").isfinite().all())
    assert torch.equal(round_to_storage(values, "fp32"), values)
