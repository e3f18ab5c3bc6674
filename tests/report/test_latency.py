"""Forms are timed in interleaved runs, against the first, and routes are restored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import legocompress as lego
from legocompress.report.latency import time_forms
from tests.support.measuring import IMAGE, convert, make_network


def test_a_failing_form_leaves_routes_as_they_were() -> None:
    class Refusing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("refused")

    model = convert(make_network(), m=0.5, o=2)
    with pytest.raises(RuntimeError, match="refused"):
        lego.measure(model, Refusing(), IMAGE, repeats=1)
    for _, unit in lego.lego_modules(model):
        assert unit.route == "assemble"
        assert unit.frozen_weight is None


def test_a_slower_form_has_a_ratio_below_one() -> None:
    small, large = torch.randn(64, 64), torch.randn(768, 768)
    order: list[str] = []

    def make_form(name: str, matrix: Tensor) -> Any:
        return lambda: (order.append(name), matrix @ matrix)

    forms = {"first": make_form("first", small), "second": make_form("second", large)}
    first, second = time_forms(forms, torch.zeros(3, 1), repeats=5)
    assert order == ["first", "second"] * 6  # interleaved, with one round to warm up
    assert first.ratio == 1
    assert second.ratio < 0.5
    assert second.median_ms > first.median_ms > 0
    assert second.quartiles_ms[0] <= second.median_ms <= second.quartiles_ms[1]
    assert (first.batch, first.repeats, first.device, first.dtype) == (3, 5, "cpu", "float32")
    assert first.threads == torch.get_num_threads()
    (once,) = time_forms({"a": forms["first"]}, torch.zeros(1, 1), repeats=1)
    assert once.quartiles_ms == (once.median_ms, once.median_ms)
