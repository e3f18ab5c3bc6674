"""A deployed conv of any geometry, by every backend, in both memory formats."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

import legocompress as lego
from legocompress import kernels
from legocompress.deploy.backends import BACKENDS, DENSE_ROUTES, KERNEL_ROUTES
from legocompress.state.deployment import ConvRoute
from tests.support.deploying import Block, check, conv, converted, relative

pytestmark = pytest.mark.slow


def test_the_table_has_one_backend_for_each_route_name() -> None:
    assert set(BACKENDS) == set(get_args(ConvRoute))
    assert all(name == backend.name for name, backend in BACKENDS.items())
    assert DENSE_ROUTES == ("assemble", "onednn")
    assert KERNEL_ROUTES == ("fused", "winograd")


class Geometry(nn.Module):
    """Convs put in every way: strided, dilated, grouped, padded by name, by mode, SAME."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            conv(3, 8),
            conv(8, 12, 3, stride=2, dilation=2, padding=2),
            Conv2dSame(12, 8, 3, stride=2),
            nn.BatchNorm2d(8),
            Conv2dSame(8, 8, 4),
            conv(8, 12, 3, groups=2),
            conv(12, 12, (1, 3), padding="same"),
            conv(12, 12, 2, padding="same", groups=3),
            conv(12, 8, 3, padding="valid"),
            conv(8, 8, 3, padding_mode="reflect"),
            conv(8, 8, 3, groups=8),
            nn.BatchNorm2d(8),
            nn.ReLU6(inplace=True),
            nn.Dropout(0.5),
            conv(8, 8, 5, padding=(1, 2)),
            nn.SiLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("size", [(27, 31), (40, 32)])
def test_every_geometry(size: tuple[int, int]) -> None:
    x = torch.randn(1, 3, *size)
    found = check(converted(Geometry(), x), x)
    assert (found.n_layers, found.n_norms, found.n_activations) == (11, 2, 2)
    assert found.n_lego >= 9


def test_other_sizes_than_the_example() -> None:
    model = converted(Geometry(), torch.randn(1, 3, 32, 32))
    others = [torch.randn(1, 3, 33, 29), torch.randn(3, 3, 46, 25)]
    with torch.no_grad():
        expected = [model(x) for x in others]
        lego.deploy_(model, torch.randn(1, 3, 32, 32), seconds=0)
        for x, y in zip(others, expected, strict=True):
            assert relative(y, model(x)) < 1e-5


@pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("route", ["assemble", "onednn", "fused", "winograd"])
def test_every_route_in_both_formats(route: Any, layout: Any) -> None:
    for net in (Block(act=nn.ReLU6), Geometry()):
        x = torch.randn(2, 3, 30, 26)
        model = converted(net, x, k=2)
        with torch.no_grad():
            expected = model(x)
            lego.deploy_(model, x, seconds=0)
            own = lego.lego_state(model).deployment.choices
            routes = dict.fromkeys(own.routes, route)
            if route == "fused" and isinstance(net, Geometry):  # two have padding by name or mode
                routes |= {f"layers.{i}": own.routes[f"layers.{i}"] for i in (7,)}
            if route == "winograd":
                kept = {"stem", "conv1"} if isinstance(net, Block) else {"layers.0", "layers.8"}
                routes = {n: route if n in kept else r for n, r in own.routes.items()}
            choices = own.model_copy(update={"routes": routes, "formats": {"": layout}})
            lego.deploy_(model, x, choices=choices)
            assert relative(expected, model(x)) < 1e-5
            assert relative(expected[:1], model(x[:1])) < 1e-5
