"""Depthwise convs on the compiled kernels."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from legocompress import kernels
from legocompress.errors import KernelError
from tests.support.kernel_cases import ACTIVATIONS, compiled

pytestmark = pytest.mark.slow

PLAIN: Any = ((1, 1), (1, 1), (1, 1))
SIZES = [(7, 7), (14, 14), (5, 9), (28, 28), (56, 56), (3, 61), (112, 112), (1, 1), (120, 130)]


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("threads", [1, 2])
def test_random_depthwise_convs_equal_pytorchs(threads: int) -> None:
    rnd = random.Random(threads)
    torch.set_num_threads(threads)
    try:
        for _ in range(150):
            kernel = rnd.choice([(3, 3), (5, 5), (7, 7), (1, 3), (2, 4), (1, 1), (9, 2)])
            stride = rnd.choice([(1, 1), (1, 1), (2, 2), (2, 1), (1, 2), (3, 3)])
            padding = rnd.choice([(kernel[0] // 2, kernel[1] // 2), (0, 0), kernel])
            dilation = rnd.choice([(1, 1), (1, 1), (2, 2), (1, 3)])
            size, c, per_channel = rnd.choice(SIZES), rnd.randint(1, 20), rnd.choice([1, 1, 2])
            if any(size[i] + 2 * padding[i] <= dilation[i] * (kernel[i] - 1) for i in (0, 1)):
                continue
            x, weight = (
                torch.randn(rnd.randint(1, 3), c, *size),
                torch.randn(c * per_channel, 1, *kernel),
            )
            bias = torch.randn(c * per_channel) if rnd.random() < 0.7 else None
            activation = rnd.choice(list(ACTIVATIONS))
            conv = (stride, padding, dilation)
            with torch.no_grad():
                y = kernels.depthwise_conv2d(x, weight, bias, *conv, activation)
            bias64 = None if bias is None else bias.double()
            expected = F.conv2d(x.double(), weight.double(), bias64, *conv, groups=c)
            expected = ACTIVATIONS[activation](expected)
            case = (x.shape, weight.shape, conv, activation)
            assert y.shape == expected.shape, case
            assert (y - expected).abs().max() < 1e-5 * (1 + expected.abs().max()), case
    finally:
        torch.set_num_threads(1)


@compiled
def test_a_nan_reaches_only_the_outputs_whose_window_holds_it() -> None:
    x = torch.randn(1, 2, 20, 20)
    x[0, 1, 3, 4] = torch.nan
    with torch.no_grad():
        y = kernels.depthwise_conv2d(x, torch.randn(2, 1, 3, 3), None, *PLAIN, "relu")  # type: ignore[call-arg]
    rows, columns = y[0, 1].isnan().nonzero(as_tuple=True)
    assert not y[0, 0].isnan().any()
    assert (set(rows.tolist()), set(columns.tolist())) == ({2, 3, 4}, {3, 4, 5})


@compiled
def test_the_operator_passes_opcheck_export_and_counting() -> None:
    x, weight, bias = torch.randn(2, 6, 9, 9), torch.randn(6, 1, 3, 3), torch.randn(6)
    torch.library.opcheck(
        torch.ops.legocompress.depthwise_conv2d.default,
        (x, weight, bias, [1, 1], [1, 1], [1, 1], "relu6"),
    )

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return kernels.depthwise_conv2d(x, weight, bias, *PLAIN, "relu6")  # type: ignore[call-arg]

    with torch.no_grad():
        assert torch.equal(torch.export.export(Layer(), (x,)).module()(x), Layer()(x))
        counted = FlopCountAnalysis(Layer(), x).set_op_handle(**kernels.FVCORE_HANDLES)
        assert counted.total() == 2 * 6 * 81 * 9
    with pytest.raises(KernelError, match="no gradient"):
        kernels.depthwise_conv2d(x.requires_grad_(), weight, bias, *PLAIN).sum().backward()  # type: ignore[no-untyped-call]


@compiled
@torch.no_grad()
def test_invalid_arguments_are_refused() -> None:
    x, weight, bias = torch.randn(2, 6, 9, 9), torch.randn(6, 1, 3, 3), torch.randn(6)
    assert kernels.depthwise_conv2d(x[:0], weight, bias, *PLAIN).shape == (0, 6, 9, 9)
    for wrong in (
        (x.double(), weight, bias),
        (x.contiguous(memory_format=torch.channels_last), weight, bias),
        (x, torch.randn(6, 2, 3, 3), bias),
        (x, torch.randn(7, 1, 3, 3), bias),
        (x, weight, bias[:5]),
        (x, torch.randn(6, 1, 33, 33), bias),
        (x[:, :, :2, :1], torch.randn(6, 1, 5, 5), bias),
    ):
        with pytest.raises(KernelError):
            kernels.depthwise_conv2d(*wrong, *PLAIN)
    with pytest.raises(KernelError, match="gelu"):
        kernels.depthwise_conv2d(x, weight, bias, *PLAIN, "gelu")  # type: ignore[call-arg]
