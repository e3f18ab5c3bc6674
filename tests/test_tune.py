"""How the routes of a layer are timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from legocompress.deploy.graph import trace
from legocompress.deploy.site import ConvSite
from legocompress.deploy.tune import _site_times
from tests.deploying import Twice, converted


@torch.no_grad()
def test_a_spare_residual_is_overwritten_while_timing_in_a_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(1, 3, 9, 11)
    site = trace("", converted(Twice(keep=False), x), (x,)).convs[2]
    calls: list[tuple[int, bool]] = []
    runner = ConvSite.runner

    def heard(self: ConvSite, *route: Any) -> Any:
        def run(x: Tensor, residual: Tensor, spare: bool) -> Tensor:
            calls.append((residual.data_ptr(), spare))
            return run_it(x, residual, spare)

        run_it = runner(self, *route)
        return run

    monkeypatch.setattr(ConvSite, "runner", heard)
    residual = torch.randn(1, 8, 9, 11)
    before = residual.clone()
    times = _site_times(site, None, "nchw", torch.randn(1, 8, 9, 11), residual, True)
    assert torch.equal(residual, before)
    timed = [place for place, spare in calls if spare]
    assert len(timed) >= sum(map(len, times.values()))
    assert residual.data_ptr() not in timed
