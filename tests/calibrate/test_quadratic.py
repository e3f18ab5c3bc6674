"""The estimated losses of weight changes, against networks that are run with the changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from legocompress.calibrate.quadratic import estimate_losses
from legocompress.models.output_errors import compare_outputs


class Small(nn.Module):
    """Two convs and a classifier of few classes, whose probabilities are far from 0 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, bias=False)
        self.second = nn.Conv2d(6, 5, 3, groups=1)

    def forward(self, x: Tensor) -> Tensor:
        return 4 * self.second(self.first(x).tanh()).mean((2, 3))


def run_with(model: nn.Module, weight: nn.Parameter, change: Tensor, images: Tensor) -> float:
    with torch.no_grad():
        targets = model(images).clone()
        before = weight.clone()
        weight.add_(change)
        errors = compare_outputs(model, lambda _: targets, [images])  # type: ignore[arg-type]
        weight.copy_(before)
    assert errors.divergence is not None
    return errors.divergence


def test_small_changes_cost_what_running_them_costs() -> None:
    torch.manual_seed(0)
    model = Small().double().eval()
    images = torch.randn(400, 2, 6, 6, dtype=torch.float64)
    weights = [model.first.weight, model.second.weight]
    changes = {w: 0.03 * w.detach().std() * torch.randn(3, *w.shape).double() for w in weights}
    estimates = estimate_losses(model, changes, images, 0)
    for weight, found in zip(weights, estimates, strict=True):
        for change, estimate in zip(changes[weight], found.tolist(), strict=True):
            assert estimate == pytest.approx(run_with(model, weight, change, images), rel=0.25)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_outputs_without_classes_give_the_squared_relative_error() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3, bias=False).double()
    images = torch.randn(300, 3, 5, 5, dtype=torch.float64)
    change = 0.1 * torch.randn_like(model.weight)[None]
    (found,) = estimate_losses(model, {model.weight: change}, images, 0)
    with torch.no_grad():
        y = model(images)
        model.weight.add_(change[0])
        expected = float((model(images) - y).square().sum() / y.square().sum())
    assert float(found) == pytest.approx(expected, rel=0.2)


def test_a_weight_that_does_not_reach_the_outputs_costs_nothing() -> None:
    model = Small().eval()
    unused = nn.Parameter(torch.ones(2, 2))
    model.register_parameter("unused", unused)
    images = torch.randn(4, 2, 6, 6)
    (found,) = estimate_losses(model, {unused: torch.ones(1, 2, 2)}, images, 0)
    assert found.tolist() == [0.0]
    both = {unused: torch.ones(1, 2, 2), model.first.weight: model.first.weight.detach()[None]}
    unused_loss, used_loss = estimate_losses(model, both, images, 0)
    assert float(unused_loss) == 0 < float(used_loss)
