"""How the routes of a layer are timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from legocompress import kernels
from legocompress.deploy.autotune import LayerTuner, time_routes
from legocompress.deploy.conv_layer import DeployedConv
from legocompress.deploy.fusing import fuse_graph
from tests.support.deploying import Twice, conv, converted

pytestmark = pytest.mark.slow


@torch.no_grad()
def test_while_timing_a_residual_is_overwritten_in_a_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(1, 3, 9, 11)
    layer = fuse_graph("", converted(Twice(keep=False), x), (x,)).convs[2]
    calls: list[tuple[int, bool]] = []
    runner = DeployedConv.runner

    def logging_runner(self: DeployedConv, *route: Any) -> Any:
        def run(x: Tensor, residual: Tensor, overwrite: bool) -> Tensor:
            calls.append((residual.data_ptr(), overwrite))
            return original(x, residual, overwrite)

        original = runner(self, *route)
        return run

    monkeypatch.setattr(DeployedConv, "runner", logging_runner)
    residual = torch.randn(1, 8, 9, 11)
    before = residual.clone()
    times = time_routes(layer, None, "nchw", torch.randn(1, 8, 9, 11), residual, True)
    assert torch.equal(residual, before)
    timed = [address for address, overwrite in calls if overwrite]
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
def test_on_several_threads_one_plan_runs_all_plain_layers_by_kernels(threads: int) -> None:
    x = torch.randn(1, 3, 9, 11)
    graph = fuse_graph("", converted(Pooled(), x), (x,))
    tuner = LayerTuner(graph, "nchw", None, None)
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
