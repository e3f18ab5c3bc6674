"""A write to an assembled weight, where it would be lost, is an error at the next use."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import StdConv2d
from torch import Tensor, nn

import legocompress as lego
from legocompress.errors import DenseOnlyError
from legocompress.lego.surgery import freeze_, to_dense
from tests.support.deploying import X as MAPS
from tests.support.deploying import deployed, runs_by_graph
from tests.support.lego_layers import lego_

X = torch.randn(2, 4, 5, 5)


def layer(kind: Any = nn.Conv2d) -> Any:
    torch.manual_seed(0)
    return lego_(kind(4, 6, 3, padding=1))


def assign_data(module: Any) -> None:
    module.weight.data = torch.ones(6, 4, 3, 3)


def add_to_data(module: Any) -> None:
    module.weight.data += 1


COUNTED: dict[str, Callable[[Any], object]] = {
    "mul_": lambda m: m.weight.mul_(2),
    "copy_": lambda m: m.weight.copy_(torch.zeros(6, 4, 3, 3)),
    "init": lambda m: nn.init.kaiming_normal_(m.weight),
    "part": lambda m: m.weight[0].zero_(),
    "detached": lambda m: m.weight.detach().add_(1),
}
UNCOUNTED: dict[str, Callable[[Any], object]] = {
    "add to data": add_to_data,
    "assign data": assign_data,
    "NumPy": lambda m: m.weight.numpy().fill(1),
}


@torch.no_grad()
@pytest.mark.parametrize("use", ["forward", "reference", "weight", "freeze", "dense", "double"])
@pytest.mark.parametrize("write", COUNTED)
def test_a_counted_write_is_refused_once(write: str, use: str) -> None:
    module = layer()
    expected = module(X)
    if use == "reference":
        module.route = "reference"
    COUNTED[write](module)
    with pytest.raises(DenseOnlyError, match=r"changed in place.*to_dense\(model\).*lego_filters"):
        {
            "weight": lambda: module.weight,
            "freeze": module.freeze,
            "dense": lambda: lego.to_dense_(module),
            "double": module.double,
        }.get(use, lambda: module(X))()
    torch.testing.assert_close(module.float()(X), expected)


@torch.no_grad()
@pytest.mark.parametrize("use", ["forward", "weight", "train"])
@pytest.mark.parametrize("write", {**COUNTED, **UNCOUNTED})
def test_a_write_to_a_cached_weight_is_refused(write: str, use: str) -> None:
    module = freeze_(layer().eval())
    expected = module(X)
    {**COUNTED, **UNCOUNTED}[write](module)
    with pytest.raises(DenseOnlyError, match="changed in place"):
        _ = module.weight if use == "weight" else module.train() if use == "train" else module(X)
    torch.testing.assert_close(module(X), expected)


def test_reading_and_training_are_not_refused() -> None:
    module = layer()
    for _ in range(2):
        assert module.weight.shape == (6, 4, 3, 3)
        module(X).sum().backward()
        with torch.no_grad():
            module.lego_filters -= 0.1 * module.lego_filters.grad
            _ = module.weight * 2
        freeze_(module.eval())
        module(X)
        module.weight.sum()
        twin = copy.deepcopy(module)
        torch.testing.assert_close(twin(X), module(X))
        module.train()
    assert isinstance(to_dense(module), nn.Conv2d)


class InPlace(StdConv2d):  # type: ignore[misc]
    """Standardises its weight in place, as it may: the weight is assembled anew at each read."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        weight -= weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding)


@torch.no_grad()
def test_a_layer_may_write_to_what_it_reads_itself() -> None:
    module = layer(InPlace)
    assert torch.equal(module(X), module(X))


@torch.no_grad()
def test_a_write_is_noticed_in_a_deployed_network() -> None:
    model: Any = deployed()[0]
    assert runs_by_graph(model)
    weight = model.conv1.weight
    assert runs_by_graph(model)
    weight.mul_(2)
    with pytest.raises(DenseOnlyError, match="changed in place"):
        model(MAPS)
    assert runs_by_graph(model)
