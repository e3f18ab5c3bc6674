"""Layers that would compute wrongly as Lego layers stay dense, with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import legocompress as lego
from tests.support.custom_convs import CUSTOM_CONVS

SPEC = lego.LegoSpec(m=0.5, o=2, allow_expansion=True)
X = torch.randn(1, 3, 6, 7, generator=torch.Generator().manual_seed(1))


class SecondReference(nn.Conv2d):
    """Computes with its parameter by a second name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.same_weight = self.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.same_weight, self.bias)


class ByName(nn.Conv2d):
    """Computes with the parameter of the name 'weight'."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self._parameters["weight"]
        assert weight is not None, "no parameter 'weight'"
        return F.conv2d(x, weight, self.bias)


class Masked(nn.Conv2d):
    """Writes zeros into its weight before each conv."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data[:, :, 1:] = 0
        return super().forward(x)


class Rewritten(nn.Conv2d):
    """Sets its weight."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight = nn.Parameter(self.weight.abs())
        return super().forward(x)


class Property(nn.Conv2d):
    """Has a property `weight` over a parameter of that name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        type(self).weight = property(lambda s: 2 * s._parameters["weight"])  # type: ignore[assignment]


class Indexed(nn.Conv2d):
    """Has an attribute that a Lego layer needs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.index = 3


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (SecondReference, "its weight is shared: with 1.same_weight"),
        (ByName, "ByName does not run with an assembled weight: 'weight'"),
        (Masked, "Masked computes by more than reading its weight"),
        (Rewritten, "Rewritten does not run with an assembled weight: the weight of this"),
        (Indexed, "it has an attribute 'index' of its own"),
        (Property, "its weight is computed"),
    ],
)
def test_what_assembling_would_make_wrong_stays_dense(kind: Any, reason: str) -> None:
    layer = kind(6, 8, 3)
    model: Any = nn.Sequential(nn.Conv2d(3, 6, 1), layer, nn.Conv2d(8, 8, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = lego.plan(model, SPEC, X)
    assert plan.skipped["1"].startswith(reason)
    assert list(plan.layers) == ["2"]
    if kind not in (Masked, Rewritten):  # they change their weight themselves
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


class Picky(nn.Conv2d):
    """Refuses maps that are not 6 x 7."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != (6, 7):
            raise ValueError("not my size")
        return super().forward(x)


@pytest.mark.parametrize("name", CUSTOM_CONVS)
def test_what_reads_its_weight_converts(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), CUSTOM_CONVS[name](), nn.Conv2d(8, 8, 1))
    assert "1" in lego.plan(model, SPEC, X).layers


def test_a_layer_that_cannot_be_tried_out_converts() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), Picky(6, 8, 3), nn.Conv2d(8, 8, 1))
    assert "1" in lego.plan(model, SPEC, X).layers
