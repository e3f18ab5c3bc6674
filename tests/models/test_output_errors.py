"""Errors of outputs, against hand computation, and blind to what decides nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from legocompress.errors import DataError
from legocompress.models.output_errors import OutputComparison, OutputErrors, compare_outputs


def compare(output: object, target: object, n_images: int) -> OutputErrors:
    comparison = OutputComparison()
    comparison.add(output, target, n_images)
    return comparison.compute()


def test_errors_by_hand() -> None:
    target = torch.tensor([[0.0, math.log(3.0)], [1.0, 1.0]])
    output = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    found = compare(output, target, 2)
    first = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    odds = 1 / (1 + math.e)
    second = 0.5 * math.log(0.5 / odds) + 0.5 * math.log(0.5 / (1 - odds))
    assert found.divergence == pytest.approx((first + second) / 2)
    assert found.agreement == 0  # the first of equal logits, against the larger one
    half = math.log(3.0) / 2
    assert found.logits == pytest.approx(((2 * half**2 + 2 * 0.25) / (2 * half**2)) ** 0.5)
    assert found.relative == pytest.approx(
        ((math.log(3.0) ** 2 + 1) / (math.log(3.0) ** 2 + 2)) ** 0.5
    )


def test_an_offset_of_all_logits_decides_nothing() -> None:
    torch.manual_seed(0)
    target = torch.randn(8, 10)
    noisy = target + torch.randn(8, 10)
    plain, shifted = compare(noisy, target, 8), compare(noisy + 50, target + 50, 8)
    assert shifted.relative < plain.relative / 10
    assert shifted.logits == pytest.approx(plain.logits, rel=1e-4)
    assert shifted.divergence == pytest.approx(plain.divergence, rel=1e-4)
    only_offset = compare(target + torch.arange(8.0)[:, None], target, 8)
    assert only_offset.relative > 0.5
    assert only_offset.logits == pytest.approx(0, abs=1e-6)
    assert only_offset.divergence == pytest.approx(0, abs=1e-6)
    assert only_offset.agreement == 100
    assert only_offset.deciding == only_offset.logits


def test_outputs_that_are_not_classes_keep_the_relative_error() -> None:
    maps = torch.ones(2, 3, 4, 4)
    found = compare([maps * 1.5], [maps], 2)
    assert (found.logits, found.divergence, found.agreement) == (None, None, None)
    assert found.deciding == found.relative == pytest.approx(0.5)
    single = compare(torch.ones(2, 1), 2 * torch.ones(2, 1), 2)
    assert (single.logits, single.divergence, single.agreement) == (None, None, 100)
    assert single.deciding == pytest.approx(0.5)


def test_batches_are_summed_over_images() -> None:
    torch.manual_seed(0)
    model, original = nn.Linear(4, 6), nn.Linear(4, 6)
    images = torch.randn(10, 4)
    one = compare_outputs(model, original, [images])
    several = compare_outputs(model, original, images.split(3))
    assert several.images == one.images == 10
    for name in ("relative", "logits", "divergence", "agreement"):
        assert getattr(several, name) == pytest.approx(getattr(one, name), rel=1e-6)


def test_outputs_of_other_shapes_are_refused() -> None:
    with pytest.raises(DataError, match=r"\[\(2, 3\)\].*\[\(2, 4\)\].*cannot be compared"):
        compare(torch.ones(2, 4), torch.ones(2, 3), 2)
