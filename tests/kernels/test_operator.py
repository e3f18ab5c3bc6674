"""The fused kernel and its fall-back against nn.Conv2d with the assembled weight, in float64."""

from __future__ import annotations

import math
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fvcore.nn import FlopCountAnalysis
from torch import Tensor

from legocompress import kernels
from legocompress.errors import KernelError
from legocompress.lego.costs import used_filters
from legocompress.lego.shape import UnitShape
from tests.support.kernel_cases import (
    ACTIVATIONS,
    SILU_OF,
    SIZES,
    Case,
    case,
    close,
    compiled,
    random_case,
    random_grouped_case,
    random_winograd_case,
)


@compiled
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_random_units_equal_the_dense_conv(threads: int) -> None:
    rnd = random.Random(threads)
    torch.set_num_threads(threads)
    try:
        for _ in range(30 if threads == 2 else 80):
            one = random_case(rnd)
            y = one.run()
            assert close(y, one.expected()), one
            channels_last = not one.x.is_contiguous()
            layout = torch.channels_last if channels_last else torch.contiguous_format
            assert y.is_contiguous(memory_format=layout)
    finally:
        torch.set_num_threads(1)


@compiled
@pytest.mark.parametrize("transform", ["direct", "winograd"])
def test_random_units_of_groups_equal_the_dense_conv(transform: str) -> None:
    rnd = random.Random(0)
    for _ in range(40):
        one = random_grouped_case(rnd)
        assert close(one.run(transform), one.expected(), 1e-4), one


@compiled
@pytest.mark.parametrize("threads", [1, 3])
def test_random_winograd_units_equal_the_dense_conv(threads: int) -> None:
    rnd = random.Random(threads)
    torch.set_num_threads(threads)
    try:
        for _ in range(80):
            one = random_winograd_case(rnd)
            assert close(one.run("winograd"), one.expected(), 2e-4), one
    finally:
        torch.set_num_threads(1)


@compiled
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("size", [(1, 14, 14), (1, 28, 28), (1, 32, 32), (1, 15, 15), (3, 14, 14)])
def test_pixels_are_read_in_place_and_uneven_tiles_are_shared(
    size: tuple[int, int, int], threads: int
) -> None:
    torch.set_num_threads(threads)
    try:
        for n, residual in ((512, True), (20, False)):
            one = case(
                n=n, c=12, kernel=(1, 1), padding=(0, 0), m=n // 2, size=size, residual=residual
            )
            assert close(one.run(), one.expected())
        deep = case(n=30, c=40, m=15, size=size)
        assert close(deep.run("winograd"), deep.expected(), 2e-4)
    finally:
        torch.set_num_threads(1)


@compiled
def test_a_dense_conv_is_a_unit_of_one_split() -> None:
    weight = torch.randn(16, 8, 3, 3)
    shape = UnitShape(16, 8, (3, 3), 1, 16, 1, 1)
    packed = kernels.pack(shape, weight, torch.arange(16).reshape(1, 16, 1), None)
    x = torch.randn(1, 8, 12, 12)
    y = kernels.lego_conv2d(x, packed, None, None, (1, 1), (1, 1), (1, 1), "none")
    assert close(y, F.conv2d(x.double(), weight.double(), padding=1))


@compiled
def test_views_are_read_as_what_they_show() -> None:
    one = case(size=(2, 8, 10), residual=True, activation="silu")
    expected = one.expected()
    one.x = one.x.transpose(2, 3).contiguous().transpose(2, 3)
    one.residual = one.residual.transpose(0, 1).contiguous().transpose(0, 1)
    one.bias = torch.stack([one.bias, one.bias], 1)[:, 0]
    assert not one.x.is_contiguous()
    assert close(one.run(), expected)


@compiled
@pytest.mark.parametrize(
    ("activation", "bad"),
    [(name, bad) for name in ACTIVATIONS for bad in (math.nan, math.inf) if (name, bad) != SILU_OF],
)
def test_what_is_not_finite_stays_so(activation: str, bad: float) -> None:
    one = case(kernel=(1, 1), padding=(0, 0), activation=activation, size=(1, 5, 5))
    one.x[0, 1, 2, 3] = bad
    found, expected = one.run(), one.expected()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isposinf(), expected.isposinf())


@compiled
def test_the_direct_call_and_the_operator_are_one_function() -> None:
    one = case()
    packed = kernels.pack(one.shape, one.lego_filters, one.index, one.coefficients)
    call = (one.x, packed, one.bias, None, (1, 1), (1, 1), (1, 1), "relu")
    with torch.inference_mode():
        assert torch.equal(kernels.lego_conv2d(*call), torch.ops.legocompress.lego_conv2d(*call))


@compiled
@pytest.mark.parametrize("transform", ["direct", "winograd"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_residual_is_overwritten_where_it_may_be(transform: str, channels_last: bool) -> None:
    for size in SIZES:
        one = case(size=(2, *size), residual=True, channels_last=channels_last, activation="relu")
        packed = kernels.pack(
            one.shape, one.lego_filters, one.index, one.coefficients, transform=transform
        )
        expected, conv = one.expected(), (one.stride, one.padding, one.dilation)
        with torch.no_grad():
            kept = kernels.lego_conv2d(one.x, packed, one.bias, one.residual, *conv, "relu")
            assert close(kept, expected, 1e-4)
            assert one.residual is not None
            layout = torch.channels_last if channels_last else torch.contiguous_format
            spare = one.residual.clone(memory_format=layout)
            found = kernels.lego_conv2d(one.x, packed, one.bias, spare, *conv, "relu", True)
        assert torch.equal(found, kept)
        assert torch.equal(found, spare)
        assert found.data_ptr() == spare.data_ptr() != kept.data_ptr()


@compiled
def test_opcheck() -> None:
    for channels_last in (False, True):
        one = case(channels_last=channels_last, residual=True)
        packed = kernels.pack(one.shape, one.lego_filters, one.index, one.coefficients)
        conv = ((1, 1), (1, 1), (1, 1))
        call = (one.x, packed, one.bias, one.residual, *conv, "relu")
        torch.library.opcheck(torch.ops.legocompress.lego_conv2d.default, call)
        unit = (one.lego_filters, one.index, one.coefficients, one.bias)
        torch.library.opcheck(
            torch.ops.legocompress.lego_conv2d_table.default, (one.x, *unit, *conv, 1)
        )


class Layer(torch.nn.Module):
    """A module that runs one unit by the compiled kernel."""

    def __init__(self, one: Case) -> None:
        super().__init__()
        packed = kernels.pack(one.shape, one.lego_filters, one.index, one.coefficients)
        self.register_buffer("packed", packed)
        self.conv = (one.stride, one.padding, one.dilation)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.lego_conv2d(x * 1.0, self.packed, None, None, *self.conv, "relu") + 0.0


@compiled
def test_export_keeps_the_operator() -> None:
    one = case(bias=False, activation="relu")
    program = torch.export.export(Layer(one), (one.x,))
    assert "legocompress.lego_conv2d" in str(program.graph)
    assert close(program.module()(one.x), one.expected())


@compiled
def test_compile_sees_through_it() -> None:
    one = case(bias=False, activation="relu", channels_last=True)
    compiled_layer = torch.compile(Layer(one), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert close(compiled_layer(one.x), one.expected())


@compiled
def test_fvcore_counts_it_within_three_hundredths() -> None:
    one = case(n=64, c=64, m=32, o=2, size=(1, 14, 14), bias=False)
    analysis = FlopCountAnalysis(Layer(one), one.x).set_op_handle(**kernels.FVCORE_HANDLES)
    analysis.unsupported_ops_warnings(False).tracer_warnings("none")
    macs = (used_filters(one.shape, one.index) * 32 * 9 + 64 * 2) * 14 * 14
    counted = analysis.by_operator()["lego_conv2d"]
    assert macs <= counted <= 1.03 * macs


@compiled
def test_a_gradient_is_refused() -> None:
    one = case()
    one.x.requires_grad_()
    with pytest.raises(KernelError, match="route 'assemble'"):
        one.run().sum().backward()


@compiled
def test_calls_that_do_not_fit_are_refused() -> None:
    one = case()
    packed = kernels.pack(one.shape, one.lego_filters, one.index, None)

    def call(x: Tensor = one.x, packed: Tensor = packed, **changes: Any) -> None:
        given = {"bias": None, "residual": None, "activation": "none", **changes}
        conv = ((1, 1), (1, 1), (1, 1))
        kernels.lego_conv2d(x, packed, given["bias"], given["residual"], *conv, given["activation"])

    with pytest.raises(KernelError, match="float64"):
        call(one.x.double())
    with pytest.raises(KernelError, match="do not fit"):
        call(one.x[:, :5].contiguous())
    with pytest.raises(KernelError, match="bias is"):
        call(bias=torch.zeros(7))
    with pytest.raises(KernelError, match="residual is"):
        call(residual=torch.zeros(1, 8, 9, 10))
    with pytest.raises(KernelError, match="activation 'gelu'"):
        call(activation="gelu")
    with pytest.raises(KernelError, match="leaves no output"):
        call(torch.zeros(1, 6, 0, 4))
    for place in (0, 3, 8, 100, 12 * 8, 14 * 8):
        damaged = packed.clone()
        damaged.view(-1)[place] ^= 0xFF
        with pytest.raises(KernelError, match="packed buffer"):
            call(packed=damaged)
    assert (
        kernels.lego_conv2d(one.x[:0], packed, None, None, (1, 1), (1, 1), (1, 1), "none").shape[0]
        == 0
    )


@compiled
def test_several_python_threads_at_once() -> None:
    cases = [case(n=32, c=16, size=(1, 20, 20), m=9) for _ in range(4)]
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as workers:
            found = list(workers.map(lambda one: [one.run() for _ in range(5)], cases))
    finally:
        torch.set_num_threads(1)
    for one, ys in zip(cases, found, strict=True):
        assert all(close(y, one.expected()) for y in ys)


def table(one: Case, **changes: Any) -> Tensor:
    unit = (one.lego_filters, one.index, one.coefficients, one.bias)
    conv = (one.stride, one.padding, one.dilation, one.shape.groups)
    return torch.ops.legocompress.lego_conv2d_table(one.x, *unit, *conv)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("coefficients", [True, False])
def test_the_table_form_equals_the_dense_conv(k: int, coefficients: bool) -> None:
    one = case(k=k, c=7, coefficients=coefficients, size=(2, 5, 6), stride=(2, 1))
    assert close(table(one), one.expected())
