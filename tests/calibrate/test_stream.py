"""The convs of a layer as they are really run, and patches of their inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, StdConv2d
from torch import nn

from legocompress.calibrate.stream import run_to
from tests.support.calibrating import Twice


@pytest.mark.parametrize("kwargs", [
    {"padding": 1}, {"stride": 2, "padding": (0, 2)}, {"dilation": 2, "padding": "same"},
    {"groups": 2, "padding": "valid"}, {"padding": 1, "padding_mode": "reflect"},
])  # fmt: skip
def test_patches_times_weight_is_the_output(kwargs: dict[str, Any]) -> None:
    conv = nn.Conv2d(4, 6, 3, bias=False, **kwargs)
    x = torch.randn(2, 4, 7, 9)
    (call,) = run_to(nn.Sequential(conv), conv, 1, x)
    y = conv(x)
    assert call.size == tuple(y.shape[2:])
    image = torch.arange(2).repeat_interleave(call.size[0] * call.size[1])
    position = torch.arange(call.size[0] * call.size[1]).repeat(2)
    groups = kwargs.get("groups", 1)
    patches = call.patches(image, position, 5)
    weight = F.pad(conv.weight, (0, 0, 0, 0, 0, 5 - 4 // groups)).reshape(groups, 6 // groups, -1)
    found = torch.einsum("pgd,gnd->pgn", patches, weight).flatten(1)
    assert torch.allclose(found, y.movedim(1, -1).reshape(-1, 6), atol=1e-5)


@pytest.mark.parametrize("cls", [Conv2dSame, StdConv2d])
def test_a_call_has_the_weight_and_input_that_the_class_made(cls: type[nn.Conv2d]) -> None:
    conv = cls(3, 4, 3, stride=2, bias=False)
    (call,) = run_to(nn.Sequential(conv, nn.ReLU()), conv, 1, x := torch.randn(1, 3, 8, 8))
    assert torch.allclose(F.conv2d(call.x, call.weight, None, call.stride), conv(x), atol=1e-6)


def test_a_linear_layer_is_a_call_of_one_pixel_each() -> None:
    linear = nn.Linear(5, 3)
    (call,) = run_to(nn.Sequential(linear), linear, 1, torch.randn(2, 4, 5))
    assert call.x.shape == (8, 5, 1, 1)
    assert call.size == (1, 1)


def test_calls_of_a_shared_layer_are_all_caught() -> None:
    network = Twice()
    x = torch.randn(2, 3, 6, 6)
    first, second = run_to(network, network.shared, 2, x)
    assert torch.equal(first.x[..., 1:-1, 1:-1], network.stem(x))
    assert torch.equal(second.x[..., 1:-1, 1:-1], network.shared(network.stem(x)).relu())
