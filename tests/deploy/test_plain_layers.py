"""Pooling, mean and linear layers by PyTorch and by the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from legocompress.deploy.fusing import fuse_graph
from legocompress.deploy.plain_layers import (
    PLAIN_ROUTES,
    DeployedLinear,
    DeployedMean,
    DeployedPool,
)
from tests.support.deploying import Block, X, check, converted


@pytest.mark.parametrize("kernel", [1, 2, 3, (2, 3)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("size", [(13, 16), (5, 7), (9, 71)])
def test_every_pooling_is_pooling(
    kernel: Any, stride: int, padding: int, dilation: int, size: tuple[int, int]
) -> None:
    if padding and kernel == 1:
        return
    pool = nn.MaxPool2d(kernel, stride, padding, dilation)
    x = torch.randn(2, 11, *size)
    x[0, 0, 3, 4], x[0, 1, 4, 5], x[1, 10] = torch.nan, torch.inf, -torch.inf
    before, layer = x.clone(), DeployedPool("pool", pool)
    for route in PLAIN_ROUTES:
        assert torch.equal(layer.run(route, x).nan_to_num(7), pool(x).nan_to_num(7))
    assert torch.equal(before.nan_to_num(7), x.nan_to_num(7))


@pytest.mark.parametrize("batch", [1, 5])
def test_means_and_linear_layers_run_by_the_kernels(batch: int) -> None:
    mean, x = DeployedMean("mean"), torch.randn(batch, 300, 7, 13)
    assert torch.allclose(mean.run("kernel", x), x.mean((2, 3), keepdim=True), atol=1e-6)
    assert torch.equal(mean.run("kernel", x[:0]), mean.run_plain(x[:0]))
    linear = nn.Linear(300, 77)
    deployed, x = DeployedLinear("fc", linear), torch.randn(batch, 300)
    with torch.no_grad():
        assert torch.allclose(deployed.run("kernel", x), linear(x), atol=1e-5)
        assert torch.equal(deployed.run("plain", x), linear(x))


@pytest.mark.slow
def test_a_classifier_is_deployed_on_two_threads() -> None:
    model = nn.Sequential(Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    torch.set_num_threads(2)
    try:
        found = check(converted(model, X), X)
    finally:
        torch.set_num_threads(1)
    assert {found.choices.routes[name] for name in ("1", "3")} <= set(PLAIN_ROUTES)


def test_a_linear_layer_fuses_its_activation_and_copies_no_weight() -> None:
    head = [nn.Linear(16, 32), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(32, 10), nn.SiLU()]
    model = nn.Sequential(Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head).eval()
    graph = fuse_graph("", model, (X,))
    first, second = (plain for plain in graph.plains if isinstance(plain, DeployedLinear))
    assert (first.activation, second.activation) == ("relu", "silu")
    assert first.weight.data_ptr() == head[0].weight.data_ptr()  # type: ignore[union-attr, operator]
    x = torch.randn(3, 16)
    with torch.no_grad():
        expected = nn.Sequential(*head).eval()(x)
        for route in PLAIN_ROUTES:
            assert torch.allclose(second.run(route, first.run(route, x)), expected, atol=1e-5)
    assert check(converted(model, X), X).n_activations == 4  # two in the block


def test_a_linear_layer_whose_weight_is_not_contiguous_runs_by_pytorch() -> None:
    linear = nn.Linear(8, 4)
    linear.weight = nn.Parameter(torch.randn(8, 4).t())
    x = torch.randn(2, 8)
    with torch.no_grad():
        assert torch.equal(DeployedLinear("fc", linear).run("kernel", x), linear(x))
        assert torch.equal(
            DeployedLinear("fc", linear.double()).run("kernel", x.double()), linear(x.double())
        )
