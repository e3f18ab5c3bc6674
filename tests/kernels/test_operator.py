"""The fused kernel and its fallback against a conv with the assembled weight, in float64."""

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
from legocompress.lego.costs import count_used_filters
from legocompress.lego.shape import UnitShape
from tests.support.kernel_cases import (
    ACTIVATIONS,
    INFINITE_SILU,
    SIZES,
    Case,
    compiled,
    is_close,
    make_case,
    random_case,
    random_grouped_case,
    random_winograd_case,
)

pytestmark = pytest.mark.slow


@compiled
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_random_units_equal_the_dense_conv(threads: int) -> None:
    rnd = random.Random(threads)
    torch.set_num_threads(threads)
    try:
        for _ in range(30 if threads == 2 else 80):
            case = random_case(rnd)
            y = case.run()
            assert is_close(y, case.expected()), case
            channels_last = not case.x.is_contiguous()
            layout = torch.channels_last if channels_last else torch.contiguous_format
            assert y.is_contiguous(memory_format=layout)
    finally:
        torch.set_num_threads(1)


@compiled
@pytest.mark.parametrize("transform", ["direct", "winograd"])
def test_random_grouped_units_equal_the_dense_conv(transform: str) -> None:
    rnd = random.Random(0)
    for _ in range(40):
        case = random_grouped_case(rnd)
        assert is_close(case.run(transform), case.expected(), 1e-4), case


@compiled
@pytest.mark.parametrize("threads", [1, 3])
def test_random_winograd_units_equal_the_dense_conv(threads: int) -> None:
    rnd = random.Random(threads)
    torch.set_num_threads(threads)
    try:
        for _ in range(80):
            case = random_winograd_case(rnd)
            assert is_close(case.run("winograd"), case.expected(), 2e-4), case
    finally:
        torch.set_num_threads(1)


@compiled
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("size", [(1, 14, 14), (1, 28, 28), (1, 32, 32), (1, 15, 15), (3, 14, 14)])
def test_inputs_read_in_place_and_tiles_shared_by_threads(
    size: tuple[int, int, int], threads: int
) -> None:
    torch.set_num_threads(threads)
    try:
        for n, residual in ((512, True), (20, False)):
            case = make_case(
                n=n, c=12, kernel=(1, 1), padding=(0, 0), m=n // 2, size=size, residual=residual
            )
            assert is_close(case.run(), case.expected())
        deep = make_case(n=30, c=40, m=15, size=size)
        assert is_close(deep.run("winograd"), deep.expected(), 2e-4)
    finally:
        torch.set_num_threads(1)


@compiled
def test_a_dense_conv_is_a_unit_of_one_split() -> None:
    weight = torch.randn(16, 8, 3, 3)
    shape = UnitShape(16, 8, (3, 3), 1, 16, 1, 1)
    packed = kernels.pack(shape, weight, torch.arange(16).reshape(1, 16, 1), None)
    x = torch.randn(1, 8, 12, 12)
    y = kernels.lego_conv2d(x, packed, None, None, (1, 1), (1, 1), (1, 1), "none")
    assert is_close(y, F.conv2d(x.double(), weight.double(), padding=1))


@compiled
def test_strided_views_are_accepted() -> None:
    case = make_case(size=(2, 8, 10), residual=True, activation="silu")
    expected = case.expected()
    case.x = case.x.transpose(2, 3).contiguous().transpose(2, 3)
    case.residual = case.residual.transpose(0, 1).contiguous().transpose(0, 1)
    case.bias = torch.stack([case.bias, case.bias], 1)[:, 0]
    assert not case.x.is_contiguous()
    assert is_close(case.run(), expected)


@compiled
@pytest.mark.parametrize(
    ("activation", "bad"),
    [
        (name, bad)
        for name in ACTIVATIONS
        for bad in (math.nan, math.inf)
        if (name, bad) != INFINITE_SILU
    ],
)
def test_nan_and_infinity_propagate(activation: str, bad: float) -> None:
    case = make_case(kernel=(1, 1), padding=(0, 0), activation=activation, size=(1, 5, 5))
    case.x[0, 1, 2, 3] = bad
    y, expected = case.run(), case.expected()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isposinf(), expected.isposinf())


@compiled
def test_the_direct_call_and_the_operator_are_one_function() -> None:
    case = make_case()
    packed = kernels.pack(case.shape, case.lego_filters, case.index, case.coefficients)
    call = (case.x, packed, case.bias, None, (1, 1), (1, 1), (1, 1), "relu")
    with torch.inference_mode():
        assert torch.equal(kernels.lego_conv2d(*call), torch.ops.legocompress.lego_conv2d(*call))


@compiled
@pytest.mark.parametrize("transform", ["direct", "winograd"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_output_may_overwrite_the_residual(transform: str, channels_last: bool) -> None:
    for size in SIZES:
        case = make_case(
            size=(2, *size), residual=True, channels_last=channels_last, activation="relu"
        )
        packed = kernels.pack(
            case.shape, case.lego_filters, case.index, case.coefficients, transform=transform
        )
        expected, conv = case.expected(), (case.stride, case.padding, case.dilation)
        with torch.no_grad():
            y = kernels.lego_conv2d(case.x, packed, case.bias, case.residual, *conv, "relu")
            assert is_close(y, expected, 1e-4)
            assert case.residual is not None
            layout = torch.channels_last if channels_last else torch.contiguous_format
            spare = case.residual.clone(memory_format=layout)
            in_place = kernels.lego_conv2d(case.x, packed, case.bias, spare, *conv, "relu", True)
        assert torch.equal(in_place, y)
        assert torch.equal(in_place, spare)
        assert in_place.data_ptr() == spare.data_ptr() != y.data_ptr()


@pytest.mark.slow
@compiled
def test_opcheck() -> None:
    for channels_last in (False, True):
        case = make_case(channels_last=channels_last, residual=True)
        packed = kernels.pack(case.shape, case.lego_filters, case.index, case.coefficients)
        conv = ((1, 1), (1, 1), (1, 1))
        call = (case.x, packed, case.bias, case.residual, *conv, "relu")
        torch.library.opcheck(torch.ops.legocompress.lego_conv2d.default, call)
        unit = (case.lego_filters, case.index, case.coefficients, case.bias)
        torch.library.opcheck(
            torch.ops.legocompress.lego_conv2d_table.default, (case.x, *unit, *conv, 1)
        )


class Layer(torch.nn.Module):
    """A module that runs case unit by the compiled kernel."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        packed = kernels.pack(case.shape, case.lego_filters, case.index, case.coefficients)
        self.register_buffer("packed", packed)
        self.conv = (case.stride, case.padding, case.dilation)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.lego_conv2d(x * 1.0, self.packed, None, None, *self.conv, "relu") + 0.0


@compiled
def test_export_keeps_the_operator() -> None:
    case = make_case(bias=False, activation="relu")
    program = torch.export.export(Layer(case), (case.x,))
    assert "legocompress.lego_conv2d" in str(program.graph)
    assert is_close(program.module()(case.x), case.expected())


@compiled
def test_compile_traces_through_the_operator() -> None:
    case = make_case(bias=False, activation="relu", channels_last=True)
    compiled_layer = torch.compile(Layer(case), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert is_close(compiled_layer(case.x), case.expected())


@compiled
def test_fvcore_counts_macs_within_three_percent() -> None:
    case = make_case(n=64, c=64, m=32, o=2, size=(1, 14, 14), bias=False)
    analysis = FlopCountAnalysis(Layer(case), case.x).set_op_handle(**kernels.FVCORE_HANDLES)
    analysis.unsupported_ops_warnings(False).tracer_warnings("none")
    macs = (count_used_filters(case.shape, case.index) * 32 * 9 + 64 * 2) * 14 * 14
    counted = analysis.by_operator()["lego_conv2d"]
    assert macs <= counted <= 1.03 * macs


@compiled
def test_a_gradient_is_refused() -> None:
    case = make_case()
    case.x.requires_grad_()
    with pytest.raises(KernelError, match="route 'assemble'"):
        case.run().sum().backward()


@compiled
def test_calls_that_do_not_fit_are_refused() -> None:
    case = make_case()
    packed = kernels.pack(case.shape, case.lego_filters, case.index, None)

    def call(x: Tensor = case.x, packed: Tensor = packed, **changes: Any) -> None:
        arguments = {"bias": None, "residual": None, "activation": "none", **changes}
        conv = ((1, 1), (1, 1), (1, 1))
        bias, residual = arguments["bias"], arguments["residual"]
        kernels.lego_conv2d(x, packed, bias, residual, *conv, arguments["activation"])

    with pytest.raises(KernelError, match="float64"):
        call(case.x.double())
    with pytest.raises(KernelError, match="do not fit"):
        call(case.x[:, :5].contiguous())
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
        kernels.lego_conv2d(case.x[:0], packed, None, None, (1, 1), (1, 1), (1, 1), "none").shape[0]
        == 0
    )


@compiled
def test_several_python_threads_at_once() -> None:
    cases = [make_case(n=32, c=16, size=(1, 20, 20), m=9) for _ in range(4)]
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as workers:
            outputs = list(workers.map(lambda case: [case.run() for _ in range(5)], cases))
    finally:
        torch.set_num_threads(1)
    for case, ys in zip(cases, outputs, strict=True):
        assert all(is_close(y, case.expected()) for y in ys)


def run_table(case: Case) -> Tensor:
    """Run a case by the fallback operator."""
    unit = (case.lego_filters, case.index, case.coefficients, case.bias)
    conv = (case.stride, case.padding, case.dilation, case.shape.groups)
    return torch.ops.legocompress.lego_conv2d_table(case.x, *unit, *conv)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("coefficients", [True, False])
def test_the_table_form_equals_the_dense_conv(k: int, coefficients: bool) -> None:
    case = make_case(k=k, c=7, coefficients=coefficients, size=(2, 5, 6), stride=(2, 1))
    assert is_close(run_table(case), case.expected())
