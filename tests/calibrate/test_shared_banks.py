"""Calibration of layers that share a bank: slots layer by layer, then the bank for all of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import legocompress as lego
from legocompress.calibrate.calibration import lego_values
from legocompress.calibrate.layers import round_bank_
from legocompress.lego.module import lego_banks
from legocompress.lego.storage import round_

IMAGE = torch.zeros(1, 3, 8, 8)


def pair(coefficients: bool = True, dtype: str = "fp32") -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    convs = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)]
    original = nn.Sequential(nn.Conv2d(3, 8, 3), *convs, nn.AdaptiveAvgPool2d(2)).eval()
    spec = lego.LegoSpec(
        m=1, o=2, k=2, share="network", coefficients=coefficients, dtype=dtype, allow_expansion=True
    )
    model = copy.deepcopy(original)
    return original, lego.convert_(model, lego.plan(model, spec, IMAGE))


@pytest.mark.parametrize("coefficients", [True, False])
def test_layers_alone_leave_the_bank_as_it_is(coefficients: bool) -> None:
    original, model = pair(coefficients)
    bank = lego_banks(model)[0][0][1].lego_filters
    before = bank.detach().clone()
    record = lego.calibrate_(model, original, torch.randn(20, 3, 8, 8), epochs=0)
    assert torch.equal(bank, before)
    assert record.error_after < record.error_before
    for row in record.layers:
        assert row.after is not None
        assert row.before is not None
        assert row.after <= row.before


def test_the_joint_tuning_changes_the_bank_of_all_layers() -> None:
    original, model = pair(dtype="fp16")
    ((_, first), *others) = lego_banks(model)[0]
    before = first.lego_filters.detach().clone()
    images = torch.randn(20, 3, 8, 8)
    alone = lego.calibrate_(copy.deepcopy(model), original, images, epochs=0)
    record = lego.calibrate_(model, original, images, epochs=8)
    assert record.epochs == 8
    assert record.error_after < alone.error_after
    assert not torch.equal(first.lego_filters, before)
    assert all(module.lego_filters is first.lego_filters for _, module in others)
    weights = [module.weight.clone() for _, module in lego.lego_modules(model)]
    round_(model)  # values were rounded to their storage dtypes already
    pairs = zip(weights, lego.lego_modules(model), strict=True)
    assert all(torch.equal(weight, module.weight) for weight, (_, module) in pairs)


def test_a_shared_bank_is_tuned_once() -> None:
    _, model = pair()
    values = lego_values(model)
    assert len(values) == len({id(value) for value in values}) == 4


def test_rounding_a_bank_scales_the_coefficients_of_all_its_layers() -> None:
    _, model = pair()
    modules = [module for _, module in lego_banks(model)[0]]
    with torch.no_grad():
        modules[1].coefficients.mul_(2.0**8)  # type: ignore[union-attr]
    weights = [module.weight.clone() for module in modules]
    round_bank_(modules)
    for module, weight in zip(modules, weights, strict=True):
        assert module.coefficients is not None
        assert module.coefficients.abs().max() <= 1
        assert (module.weight - weight).norm() < 1e-3 * weight.norm()
