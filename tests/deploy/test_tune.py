"""How the routes of a layer are timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from legocompress import kernels
from legocompress.deploy.graph import trace
from legocompress.deploy.site import ConvSite
from legocompress.deploy.tune import _site_times, _Tuner
from tests.support.deploying import Twice, conv, converted


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


class Pooled(nn.Module):
    """Two convs, a mean of each map, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = conv(3, 8), conv(8, 8)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.pool(self.conv(self.stem(x))).flatten(1))


@pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")
@pytest.mark.parametrize("threads", [1, 2])
def test_on_several_threads_a_plan_leaves_pytorchs_threads_asleep(threads: int) -> None:
    x = torch.randn(1, 3, 9, 11)
    graph = trace("", converted(Pooled(), x), (x,))
    tuner = _Tuner(graph, "nchw", None, None)
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            tuner.run(x)
    finally:
        torch.set_num_threads(1)
    for plain in graph.plains:
        plain.route = "plain"
    plans = tuner.plans()
    assert plans["lego"].routes["pool"] == plans["lego"].routes["fc"] == "plain"
    assert ("lego alone" in plans) == (threads > 1)
    if threads > 1:
        plains = {"pool": "kernel", "fc": "kernel"}
        assert plans["lego alone"].routes == {**plans["lego"].routes, **plains}
