"""Ranges of maps: 0 is one of the values, and each method cuts what it says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from legocompress.quantize.ranges import METHODS, Values, choose_range, join_values, make_range


def observe(x: Tensor) -> Values:
    values = Values()
    values.extend(x)
    values.count(x)
    return values


@pytest.mark.parametrize(
    ("low", "high", "zero"), [(0.0, 6.0, 0), (-6.0, 0.0, 255), (-1.0, 1.0, 128), (-0.1, 4.0, 6)]
)
def test_the_ends_and_zero_are_inside(low: float, high: float, zero: int) -> None:
    made = make_range(low, high)
    assert made.zero == zero
    assert -made.scale * made.zero <= low + made.scale / 2
    assert made.scale * (255 - made.zero) >= high - made.scale / 2


def test_a_map_of_zeros_has_a_range() -> None:
    assert choose_range(observe(torch.zeros(8)), "least squares") == make_range(0, 0)


def test_percentiles_leave_out_what_is_rare() -> None:
    x = torch.cat([torch.rand(100_000), torch.tensor([50.0])])
    values = observe(x)
    assert choose_range(values, "min-max").scale == pytest.approx(50 / 255, rel=1e-3)
    assert choose_range(values, "99.9 %").scale < 2 / 255


def test_least_squares_has_the_least_error_of_all_methods() -> None:
    torch.manual_seed(0)
    x = torch.randn(100_000) ** 3
    values = observe(x)
    errors = {}
    for method in METHODS:
        made = choose_range(values, method)
        rounded = torch.fake_quantize_per_tensor_affine(x, made.scale, made.zero, 0, 255)
        errors[method] = float((x - rounded).square().mean())
    assert min(errors, key=errors.__getitem__) == "least squares"
    assert errors["least squares"] < 0.95 * errors["min-max"]


def test_zeros_do_not_count() -> None:
    sparse = observe(torch.cat([torch.zeros(100_000), torch.rand(1000)]))
    assert float(sparse.counts.sum()) == pytest.approx(1000, abs=1)


def test_joined_maps_count_alike() -> None:
    joined = join_values([observe(torch.full((10_000,), 1.0)), observe(torch.full((10,), -2.0))])
    assert (joined.low, joined.high) == (-2.0, 1.0)
    below = float(joined.counts[joined.centres() < 0].sum())
    assert below == pytest.approx(float(joined.counts.sum()) / 2)
