"""Weights as Lego units: their error, their rounding, and weights of unusual scale."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from legocompress.compress.factorize import relative_error
from legocompress.lego.algebra import assemble
from legocompress.lego.module import lego_modules
from tests.support.small_cnn import NAMES, converted, lego, small_cnn


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_values_are_rounded_to_what_is_stored(name: str, dtype: torch.dtype) -> None:
    model = small_cnn()
    converted(model, m=0.5, o=2, k=2, dtype=name, coefficients_dtype="bf16")
    for _, module in lego_modules(model):
        values, gains = module.lego_filters, module.coefficients
        assert gains is not None
        assert values.dtype == gains.dtype == torch.float32
        assert torch.equal(values.to(dtype).float(), values)
        assert torch.equal(gains.bfloat16().float(), gains)
        assert (module.storage_dtype, module.coefficients_dtype) == (name, "bf16")
        assert module.weight_error is not None
        assert 0 < module.weight_error < 1


def test_coefficients_are_rounded_to_fp16_and_filters_kept_by_default() -> None:
    model = small_cnn()
    converted(model, m=0.5, o=2)
    layer = lego(model, "6")
    assert torch.equal(layer.coefficients.half().float(), layer.coefficients)
    assert not torch.equal(layer.lego_filters.half().float(), layer.lego_filters)


def test_the_noted_error_is_that_of_the_assembled_weight() -> None:
    model = small_cnn()
    dense = copy.deepcopy(model)
    converted(model, m=0.5, o=4, dtype="bf16")
    for name, module in lego_modules(model):
        exact = dense.get_submodule(name).weight.detach().double()
        shape = module.lego_shape
        weight = assemble(shape, module.lego_unit)
        expected = float(((weight - exact).norm() / exact.norm()).detach())
        assert module.weight_error == pytest.approx(expected, rel=1e-4)
        assert 0 < expected < 1


@pytest.mark.slow
@pytest.mark.parametrize("coefficients", [True, False])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("scale", [1e-25, 1e-20, 1e15, 1e25])
def test_weights_of_extreme_scale_are_served_as_well_as_others(
    scale: float, k: int, coefficients: bool
) -> None:
    def errors(factor: float) -> dict[str, float]:
        torch.manual_seed(1)
        model = small_cnn()
        with torch.no_grad():
            for name in NAMES:
                model.get_submodule(name).weight.mul_(factor)
        dense = copy.deepcopy(model)
        converted(model, m=0.5, o=2, k=k, coefficients=coefficients)
        found = {}
        for name, module in lego_modules(model):
            exact = dense.get_submodule(name).weight.detach().double()
            difference = module.weight.detach().double() - exact
            found[name] = float(difference.norm() / exact.norm())
            assert all(bool(p.isfinite().all()) for p in module.parameters())
            assert module.weight_error == pytest.approx(found[name], rel=1e-3)
        return found

    usual = errors(1.0)
    for name, error in errors(scale).items():
        assert 0 < error < 1.1 * usual[name] + 1e-3


def test_weights_of_zero_stay_zero() -> None:
    model = small_cnn()
    nn.init.zeros_(model[6].weight)
    converted(model, m=0.5, o=2, k=2)
    layer = lego(model, "6")
    assert torch.equal(layer.weight, torch.zeros(20, 6, 3, 3))
    assert layer.weight_error == 0
    assert all(bool(p.isfinite().all()) for p in layer.parameters())


def total_error(model: nn.Module, **settings: Any) -> float:
    copied = converted(copy.deepcopy(model), **settings)
    return sum(module.weight_error or 0.0 for _, module in lego_modules(copied))


def test_the_error_falls_as_there_are_more_filters_or_terms() -> None:
    model = small_cnn()
    by_m = [total_error(model, m=m, o=2) for m in (0.25, 0.5, 1.0)]
    by_k = [total_error(model, m=0.5, o=2, k=k, allow_expansion=True) for k in (1, 2, 4)]
    assert by_m[0] > 1.1 * by_m[1] > 1.1 * 1.1 * by_m[2] > 0
    assert by_k[0] > 1.1 * by_k[1] > 1.1 * 1.1 * by_k[2] > 0


def test_coefficients_lower_the_error() -> None:
    model = small_cnn()
    assert total_error(model, coefficients=True) < 0.95 * total_error(model, coefficients=False)


def test_relative_error_by_hand() -> None:
    exact = torch.tensor([3.0, 4.0])
    assert relative_error(exact, torch.tensor([3.0, 4.5])) == pytest.approx(0.1)
    assert relative_error(exact, exact) == 0
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(exact, torch.zeros(2)) == pytest.approx(1)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_relative_error_does_not_depend_on_scale(scale: float) -> None:
    exact: Tensor = torch.tensor([3.0, 4.0]) * scale
    assert relative_error(exact, torch.tensor([3.0, 4.5]) * scale) == pytest.approx(0.1, rel=1e-4)
