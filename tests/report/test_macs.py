"""MACs by fvcore equal our own count, and the routes it counts compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import legocompress as lego
from legocompress.report.macs import count_macs_with_fvcore, use_cheapest_routes
from tests.support.measuring import convert, make_network


@pytest.mark.parametrize("settings", [{"m": 0.5, "o": 2}, {"m": 0.5, "o": 3, "k": 2},
                                      {"m": 0.25, "o": 4, "coefficients": False}])  # fmt: skip
def test_fvcore_agrees_with_linear_layers_converted(settings: dict[str, Any]) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 10, 3),
        nn.Conv2d(10, 24, 3, stride=2),
        nn.Flatten(),
        nn.Linear(24 * 9, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    ).eval()
    image = torch.zeros(1, 3, 9, 9)
    convert(model, image, linear=True, allow_expansion=True, **settings)
    assert [name for name, _ in lego.lego_modules(model)] == ["1", "3", "5"]
    report = lego.measure(model, example_input=image)
    lego_rows = [row for row in report.rows if row.n_lego and row.macs < row.dense_macs]
    assert lego_rows
    expected = report.total("macs")
    assert count_macs_with_fvcore(model, image) == report.fvcore_macs == expected


def test_the_cheapest_routes_give_the_same_outputs() -> None:
    model = convert(make_network(), m=0.5, o=2).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        with use_cheapest_routes(model):
            assert [m.route for _, m in lego.lego_modules(model)] == ["reference", "assemble"]
            torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)
    assert [m.route for _, m in lego.lego_modules(model)] == ["assemble", "assemble"]
    assert expected.std() > 0
