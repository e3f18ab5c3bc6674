"""The rounding layers in float32: within one step of the integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import legocompress as lego
from legocompress.export.qdq_layers import RoundedConv, quantize_channels, summand_range
from legocompress.lego.integer import dequantize_map, quantize_map
from legocompress.quantize.assignment import assign_roles
from legocompress.quantize.forward import QuantizedForward
from legocompress.quantize.layers import ConvLayer
from legocompress.quantize.operators import IntegerConvLayer
from legocompress.state.quantization import MapRange
from tests.support.quantizing import small_images, small_network


@pytest.fixture(scope="module")
def quantised() -> nn.Module:
    return lego.quantize_(small_network(), small_images())


@pytest.mark.parametrize("form", ["lego", "assemble-at-load", "dense"])
def test_each_conv_is_within_a_step_of_the_integers(quantised: nn.Module, form: Any) -> None:
    record: Any = lego.lego_state(quantised).quantization
    forward: Any = quantised.__dict__["forward"]
    assert isinstance(forward, QuantizedForward)
    with torch.no_grad():
        quantised(small_images(1))  # builds the graph
    ranges, calls = record.parts[""].ranges, record_calls(forward.graph, small_images(8, seed=3))
    graph = forward.trace()
    names = assign_roles(graph).names
    checked = set()
    for node, layer in graph.layers():
        if not isinstance(layer, ConvLayer):
            continue
        checked.add(layer.name)
        inputs = [ranges[names[x]] for x in node.args]
        out, before = ranges[layer.name], None
        if layer.pointwise is not None:
            before = ranges[layer.pre_name]
        residual = inputs[1] if len(inputs) > 1 else None
        rounded = RoundedConv(layer, form, inputs[0], out, before, residual)
        maps, expected = calls[layer.name]
        floats = [dequantize_map(q, r.scale, r.zero) for q, r in zip(maps, inputs, strict=True)]
        with torch.no_grad():
            y = quantize_map(rounded(*floats), out.scale, out.zero)
        steps = (y.int() - expected.int()).abs()
        # A table is looked up after rounding; the other forms round weights once more.
        limit = 1 if form == "lego" and layer.pointwise is None else 2
        assert int(steps.max()) <= limit, layer.name
        assert float(steps.float().mean()) < 0.75, layer.name
    assert {"a", "b", "squeeze", "stem", "depthwise", "average"} <= checked


def record_calls(graph: nn.Module, images: Tensor) -> dict[str, tuple[tuple[Tensor, ...], Tensor]]:
    """The maps that each integer conv reads, and the one that it returns."""
    calls = {}

    def record(layer: Any, inputs: Any, output: Any) -> None:
        calls[layer.name] = (inputs, output)

    convs = [layer for layer in graph.modules() if isinstance(layer, IntegerConvLayer)]
    handles = [layer.register_forward_hook(record) for layer in convs]
    with torch.no_grad():
        graph(images)
    for handle in handles:
        handle.remove()
    return calls


def test_a_clipped_summand_clips_the_sum() -> None:
    out, residual = MapRange(scale=0.1, zero=20), MapRange(scale=0.2, zero=100)
    bounds = summand_range(out, residual)
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(5000, generator=generator) * 60
    r = (torch.randint(256, (5000,), generator=generator) - 100) * 0.2
    low, high = -bounds.zero * bounds.scale, (255 - bounds.zero) * bounds.scale
    clipped = y.clamp(low, high)
    assert bool((clipped != y).any())
    ends = (-20 * 0.1, 235 * 0.1)
    step = bounds.scale  # zero lies on a step, which moves an end by less than one
    gap = ((clipped + r).clamp(*ends) - (y + r).clamp(*ends)).abs()
    assert float(gap.max()) <= step


def test_weights_of_tiny_channels_leave_room_for_their_bias() -> None:
    weight: Tensor = torch.tensor([[1.0, -0.5], [1e-12, 0.0], [0.0, 0.0]]).double()
    bias = torch.tensor([1.0, 5.0, -3.0]).double()
    values, scales = quantize_channels(weight, None, bias, x_scale=0.01)
    assert values.tolist() == [[127, -64], [0, 0], [0, 0]]
    assert bool((bias.abs() / (scales.double() * 0.01) < 2.0**31 - 1).all())
    signed, factors = torch.tensor([[3.0, -6.0]]).double() * -0.5, torch.tensor([-0.5]).double()
    values, scales = quantize_channels(signed, factors, bias[:1], x_scale=0.01)
    assert (values.tolist(), scales.tolist()) == ([[-3, 6]], [0.5])
