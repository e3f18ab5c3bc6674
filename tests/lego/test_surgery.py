"""Layers become Lego modules and dense again; frozen weights; guarded fuse methods."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, nn

from legocompress.errors import DenseOnlyError
from legocompress.lego.module import lego_modules
from legocompress.lego.surgery import freeze_, guard_fusing_, to_dense_
from tests.support.lego_layers import STANDARDISED, close, conv, lego_


def test_freezing_keeps_outputs_and_training_thaws() -> None:
    model = nn.Sequential(
        lego_(conv(6, 4, 3), n_split=4, n_terms=2), nn.ReLU(), lego_(conv(4, 4, 1))
    ).eval()
    first: Any = model[0]
    x = torch.randn(1, 6, 5, 5, dtype=torch.float64)
    expected = model(x)
    assert freeze_(model) is model
    assert torch.equal(model(x), expected)
    assert first.weight is first.weight
    assert not first.weight.requires_grad
    with torch.no_grad():
        first.lego_filters.mul_(2)
    assert torch.equal(model(x), expected)
    model.eval()
    assert torch.equal(model(x), expected)
    model.train()
    assert first.frozen_weight is None
    assert first.weight.requires_grad
    assert not torch.equal(model(x), expected)
    model(x).sum().backward()
    assert first.lego_filters.grad.abs().max() > 0


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "kind", [nn.Conv2d, Conv2dSame, *STANDARDISED], ids=lambda kind: kind.__name__
)
def test_to_dense_gives_the_original_layer_back(
    kind: type[nn.Conv2d], bias: bool, frozen: bool
) -> None:
    layer = kind(6, 8, 3, stride=2, bias=bias).double()
    keys, attributes = list(layer.state_dict()), set(layer.__dict__)
    module: Any = lego_(layer, n_split=4, n_terms=2).eval()
    weight = module.weight.detach().clone()
    x = torch.randn(2, 6, 7, 9, dtype=torch.float64)
    expected = module(x)
    if frozen:
        module.freeze()
    dense: Any = to_dense_(module)
    assert dense is module
    assert type(dense) is kind
    assert isinstance(dense.weight, nn.Parameter)
    assert torch.equal(dense.weight, weight)
    assert torch.equal(dense(x), expected)
    assert set(dense.__dict__) == attributes
    assert not dict(dense.named_buffers())
    assert list(dense.state_dict()) == keys
    dense.weight = nn.Parameter(torch.zeros_like(weight))
    assert not torch.equal(dense(x), expected)


def test_to_dense_gives_a_linear_back() -> None:
    module: Any = lego_(nn.Linear(6, 5, dtype=torch.float64), n_split=4)
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = module(x)
    to_dense_(module)
    assert type(module) is nn.Linear
    assert list(module.state_dict()) == ["weight", "bias"]
    assert torch.equal(module(x), expected)


def test_a_conv_at_two_names_stays_one_object() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = conv(4, 4, 3, padding=1)
            self.second = self.first
            self.listed = [self.first]

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model: Any = Twice()
    lego_(model.first)
    assert model.second is model.first is model.listed[0]
    assert [name for name, _ in lego_modules(model)] == ["first"]
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    weight, bias = model.first.weight, model.first.bias
    once = F.conv2d(x, weight, bias, padding=1)
    close(model(x), F.conv2d(once, weight, bias, padding=1))
    copied = copy.deepcopy(model)
    assert copied.second is copied.first
    to_dense_(model)
    assert type(model.second) is nn.Conv2d
    assert model.second is model.first


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(4, 4, 3, padding=1)
        self.fused = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def fuse(self) -> None:
        self.fused += 1


class Deploys(Block):
    def switch_to_deploy(self) -> None:
        self.fused += 1

    def reparameterize(self) -> None:
        self.fused += 1


def test_fuse_methods_of_blocks_with_lego_modules_are_guarded() -> None:
    model: Any = nn.Sequential(Block(), Deploys(), Block())
    lego_(model[0].conv)
    lego_(model[1].conv)
    assert guard_fusing_(model) is model
    for method in (model[0].fuse, model[1].fuse, model[1].switch_to_deploy):
        with pytest.raises(DenseOnlyError, match=r"to_dense\(model\)"):
            method()
    with pytest.raises(DenseOnlyError, match=r"reparameterize\(\)"):
        model[1].reparameterize()
    model[2].fuse()  # holds no Lego module
    assert [block.fused for block in model] == [0, 0, 1]
    copied = copy.deepcopy(model)
    with pytest.raises(DenseOnlyError):
        copied[0].fuse()
    to_dense_(model)
    model[0].fuse()
    model[1].fuse()
    model[1].reparameterize()
    assert [block.fused for block in model] == [1, 2, 1]
    with pytest.raises(DenseOnlyError):
        copied[0].fuse()
