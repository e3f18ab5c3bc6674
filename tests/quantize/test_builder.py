"""The integers of an operator compute what its real values say, within a rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import legocompress as lego
from legocompress.deploy.folding import fold_conv
from legocompress.errors import CheckpointError
from legocompress.lego import integer
from legocompress.quantize import builder
from legocompress.quantize.layers import ConvLayer, deployed_conv_layer
from legocompress.quantize.ranges import make_range
from legocompress.state.quantization import ConvShifts, MapRange


def conv_layer(k: int = 0, groups: int = 1) -> ConvLayer:
    """A conv with a norm, as a Lego layer with k terms or dense (k = 0)."""
    torch.manual_seed(k + groups)
    conv = nn.Conv2d(8, 12, 3, padding=1, groups=groups)
    norm = nn.BatchNorm2d(12).eval()
    assert norm.running_mean is not None
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    if k:
        spec = lego.LegoSpec(m=0.5, o=2, k=k, allow_expansion=True, only=("0",))
        model = nn.Sequential(conv)
        lego.convert_(model, lego.plan(model, spec, torch.zeros(1, 8, 6, 6)))
    return deployed_conv_layer("x", fold_conv(conv, norm, "none"))


def shifts_for(
    layer: ConvLayer, x: Tensor, x_range: MapRange, y_range: MapRange, residual: Any = None
) -> ConvShifts:
    sums = builder.Sums(torch.zeros(len(layer.source.filters), dtype=torch.float64))
    z = layer.transform(x)
    sums.extend_filters(z)
    layer.merge(z, sums.extend)
    chosen = builder.choose_shifts(layer.source, sums, x_range, y_range, residual)
    assert chosen is not None
    return chosen


def range_of(x: Tensor) -> MapRange:
    return make_range(min(0.0, float(x.min())), max(0.0, float(x.max())))


@pytest.mark.parametrize(("k", "groups"), [(0, 1), (0, 4), (1, 1), (3, 1), (2, 2)])
@pytest.mark.parametrize("adds", [False, True])
def test_a_conv_is_within_a_step_of_its_real_values(k: int, groups: int, adds: bool) -> None:
    layer = conv_layer(k, groups)
    with torch.no_grad():
        x = torch.randn(2, 8, 6, 6).relu()
        x_range = range_of(x)
        q = integer.quantize_map(x, x_range.scale, x_range.zero)
        real = integer.dequantize_map(q, x_range.scale, x_range.zero)
        y = layer.convolve(real)
        rest = torch.randn_like(y) if adds else None
        rest_range = None if rest is None else range_of(rest)
        rest_q = None
        if rest is not None and rest_range is not None:
            rest_q = integer.quantize_map(rest, rest_range.scale, rest_range.zero)
            y = y + integer.dequantize_map(rest_q, rest_range.scale, rest_range.zero)
        y_range = range_of(y)
        shifts = shifts_for(layer, real, x_range, y_range, rest_range)
        assert shifts.output >= 4
        conv = builder.build_conv("x", layer.source, x_range, y_range, shifts, residual=rest_range)
        actual = integer.convolve(conv, q, rest_q, padding=(1, 1, 1, 1))
    steps = y / y_range.scale + y_range.zero
    assert float((actual.float() - steps.clamp(0, 255)).abs().max()) < 0.7


def test_relu6_clamps_at_its_bounds() -> None:
    assert builder.clamp_bounds("relu", MapRange(scale=0.1, zero=7)) == (7, 255)
    assert builder.clamp_bounds("relu6", MapRange(scale=0.1, zero=7)) == (7, 67)
    assert builder.clamp_bounds("", MapRange(scale=0.1, zero=7)) == (0, 255)


def test_a_table_holds_the_activation() -> None:
    x, y = MapRange(scale=0.05, zero=100), MapRange(scale=0.03, zero=10)
    table = builder.build_table(F.silu, x, y)
    real = F.silu((torch.arange(256).double() - 100) * 0.05)
    assert torch.equal(table.double(), (real / 0.03 + 10).round().clamp(0, 255))


@pytest.mark.parametrize(("a", "b"), [((0.1, 0), (0.1, 128)), ((2.0, 255), (0.001, 3))])
def test_a_sum_never_saturates_early(a: Any, b: Any) -> None:
    one, two = (MapRange(scale=s, zero=z) for s, z in (a, b))
    torch.manual_seed(0)
    p, q = (torch.randint(0, 256, (1, 1, 40, 40), dtype=torch.uint8) for _ in range(2))
    real = one.scale * (p.double() - one.zero) + two.scale * (q.double() - two.zero)
    y = range_of(real.float())
    shift = builder.add_shift(one, two, y)
    assert shift is not None
    multipliers = (builder.map_multiplier(one, y, shift), builder.map_multiplier(two, y, shift))
    zeros, bias = (one.zero, two.zero), builder.real_bias(y, shift)
    actual = integer.add_maps(p, q, zeros, multipliers, bias, shift)
    expected = (real / y.scale + y.zero).clamp(0, 255)
    assert float((actual.double() - expected).abs().max()) < 0.6


def test_maps_of_too_different_scales_cannot_be_added() -> None:
    small, large = MapRange(scale=1e-4, zero=0), MapRange(scale=1.0, zero=0)
    assert builder.add_shift(large, large, small) is None


def test_a_gate_multiplies() -> None:
    x, gate, y = (MapRange(scale=s, zero=z) for s, z in ((0.1, 3), (1 / 255, 0), (0.1, 3)))
    shift = builder.gate_shift(x, gate, y)
    assert shift == 6
    torch.manual_seed(0)
    p = torch.randint(0, 256, (1, 4, 8, 8), dtype=torch.uint8)
    g = torch.randint(0, 256, (1, 4, 1, 1), dtype=torch.uint8)
    multiplier = builder.gate_multiplier(x, gate, y, shift)
    bias = builder.real_bias(y, shift)
    actual = integer.scale_maps(p, g, (3, 0), multiplier, bias, shift)
    expected = (p.double() - 3) * g.double() / 255 + 3
    assert float((actual.double() - expected).abs().max()) < 0.6


def test_shifts_of_another_layer_are_refused() -> None:
    layer = conv_layer()
    shifts = ConvShifts(filters="aaa", output=3)
    one = MapRange(scale=0.1, zero=0)
    with pytest.raises(CheckpointError, match="'x' has 12 filters, and 3 shifts"):
        builder.build_conv("x", layer.source, one, one, shifts)
