"""Layers that lose most stay in fp32, and the record tells them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import legocompress as lego
from legocompress.quantize import search
from tests.support.quantizing import small_images, small_network


def test_a_layer_that_loses_most_stays_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_network(convert=False)
    weight = model.get_submodule("depthwise").weight
    assert isinstance(weight, nn.Parameter)
    with torch.no_grad():
        weight.mul_(torch.logspace(-3, 3, 8).reshape(8, 1, 1, 1))  # maps of very different scales
        images = small_images()
        before, own = model(images), weight.clone()
    monkeypatch.setattr(search, "ENOUGH", 0.0)
    lego.quantize_(model, images)
    record = lego.lego_state(model).quantization
    assert record is not None
    assert len(record.float_layers) == 1  # one in ten, at least one
    name, reason = next(iter(record.float_layers.items()))
    assert "in fp32 the error of the network is" in reason
    assert name not in record.dense_layers
    with torch.no_grad():
        change = float((model(images) - before).norm() / before.norm())
    assert change == pytest.approx(record.error, rel=2)
    if name == "depthwise":
        assert torch.equal(weight, own)


def test_no_layer_stays_in_fp32_where_the_error_is_small() -> None:
    model = lego.quantize_(small_network(), small_images())
    record = lego.lego_state(model).quantization
    assert record is not None
    assert record.error < search.ENOUGH
    assert record.float_layers == {}


def test_a_layer_whose_multipliers_do_not_fit_stays_in_fp32() -> None:
    model = small_network(convert=False)
    norm = model.get_submodule("a_norm")
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    with torch.no_grad():  # the conv's large sums cancel against an enormous bias
        norm.weight.fill_(1e5)
        norm.bias.copy_(norm.running_mean * 1e5 / (norm.running_var + norm.eps).sqrt())  # type: ignore[operator]
        norm.bias.sub_(3e5)
    lego.quantize_(model, small_images())
    record = lego.lego_state(model).quantization
    assert record is not None
    with torch.no_grad():
        assert bool(model(small_images(2)).isfinite().all())
