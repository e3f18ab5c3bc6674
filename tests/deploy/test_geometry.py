"""The geometry of a conv is what its own forward reads, also after attributes were changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

import legocompress as lego
from legocompress import kernels
from legocompress.deploy.geometry import Geometry
from tests.support.deploying import X, check, conv, converted, relative

CHANGES: dict[str, dict[str, Any]] = {
    "dilated": {"stride": (1, 1), "dilation": (2, 2), "padding": (2, 2)},
    "unpadded": {"padding": (0, 0)},
    "uneven": {"padding": (0, 2), "stride": (2, 1)},
    "numbers": {"padding": 2, "stride": 1, "dilation": 2},
    "lists": {"padding": [2], "stride": [1, 2], "dilation": [2]},
    "same": {"padding": "same", "stride": (1, 1), "dilation": (1, 3)},
    "valid": {"padding": "valid"},
    "kernel size": {"kernel_size": (5, 5)},
}


def edited(layer: nn.Conv2d, change: str) -> nn.Conv2d:
    for name, value in CHANGES[change].items():
        setattr(layer, name, value)
    return layer


LAYERS: dict[str, Callable[[], nn.Conv2d]] = {
    "strided": lambda: conv(8, 12, 3, stride=2),
    "rectangular": lambda: conv(8, 12, (2, 4), padding=(1, 2)),
    "depthwise": lambda: conv(8, 8, 3, groups=8),
    "reflected": lambda: conv(8, 12, 3, padding_mode="reflect"),
    "SAME": lambda: Conv2dSame(8, 12, 3, stride=2),
}
CASES = [
    (layer, change)
    for layer in LAYERS
    for change in CHANGES
    if layer != "SAME" or change not in ("numbers", "lists")  # Conv2dSame itself wants pairs
]


@pytest.mark.parametrize(("layer_name", "change"), CASES)
@torch.no_grad()
def test_the_padded_input_and_the_rest_give_the_conv(layer_name: str, change: str) -> None:
    layer = edited(LAYERS[layer_name]().double(), change)
    x = torch.randn(2, 8, 14, 13, dtype=torch.float64)
    geometry = Geometry.of(layer)
    padded, padding = geometry.pad_input(x)
    y = torch.conv2d(
        padded, layer.weight, layer.bias, geometry.stride, padding, geometry.dilation, layer.groups
    )
    torch.testing.assert_close(y, layer(x))


def network(change: str) -> nn.Module:
    return nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), edited(conv(8, 8, stride=2), change),
        nn.ReLU(), edited(conv(8, 8, bias=False), change), nn.BatchNorm2d(8),
    )  # fmt: skip


@pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("only", [None, ("fused",), ("table",), ("reference",), ("onednn",)])
def test_layers_that_were_changed_are_deployed_by_every_route(change: str, only: Any) -> None:
    found = check(converted(network(change), X), X, only=only)
    assert (found.n_layers, found.n_lego, found.notes) == (3, 2, ())
    if only is not None:
        routes = [found.choices.routes[name] for name in ("3", "5")]
        assert routes == [only[0]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("form", ["lego", *(["fused"] if kernels.available() else [])])
def test_layers_that_were_changed_are_exported(form: Any, tmp_path: Path) -> None:
    model = converted(network("dilated"), X)
    with torch.no_grad():
        expected = model(X)
    lego.export_program(model, tmp_path / "x.pt2", form, example_input=X[:1])
    with torch.no_grad():
        assert relative(expected, torch.export.load(tmp_path / "x.pt2").module()(X)) < 1e-3


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_the_reference_route_follows(change: str) -> None:
    model: Any = converted(network(change), X).double()
    expected = lego.to_dense(model)(X.double())
    for _, layer in lego.lego_modules(model):
        layer.route = "reference"
    assert relative(expected, model(X.double())) < 1e-12
