"""Linear layers on the compiled kernels."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from legocompress import kernels
from legocompress.errors import KernelError
from tests.support.kernel_cases import ACTIVATIONS, compiled


@compiled
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("threads", [1, 2])
def test_linear_layers_equal_pytorchs(activation: str, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        # Fewer channels than a vector has lanes, and more than are summed at once for many inputs.
        for batch, channels, n_out in ((1, 1, 1), (1, 9001, 37), (4, 300, 5), (9, 9001, 18)):
            x, weight = torch.randn(batch, channels), torch.randn(n_out, channels)
            for bias in (None, torch.randn(n_out)):
                y = kernels.linear(x, weight, bias, activation)
                bias64 = None if bias is None else bias.double()
                expected = ACTIVATIONS[activation](F.linear(x.double(), weight.double(), bias64))
                assert (y - expected).abs().max() < 1e-6 * channels**0.5 * 10
    finally:
        torch.set_num_threads(1)


@compiled
def test_an_output_does_not_depend_on_its_neighbours_or_threads() -> None:
    x, weight = torch.randn(7, 5000), torch.randn(83, 5000)
    whole = kernels.linear(x, weight, None)
    torch.set_num_threads(2)
    try:
        assert torch.equal(kernels.linear(x, weight, None), whole)
    finally:
        torch.set_num_threads(1)
    x[3, 17] = math.nan
    rows = kernels.linear(x, weight, None).isnan().all(1)
    assert rows.tolist() == [i == 3 for i in range(7)]


@compiled
def test_invalid_arguments_are_refused() -> None:
    x, weight, bias = torch.randn(2, 6), torch.randn(3, 6), torch.randn(3)
    assert kernels.linear(x[:0], weight, bias).shape == (0, 3)
    for wrong in (
        (x.double(), weight, bias),
        (x[:, :5].contiguous(), weight, bias),
        (x, weight.t(), bias),
        (x, weight, bias[:2]),
        (x[0], weight, bias),
    ):
        with pytest.raises(KernelError):
            kernels.linear(*wrong)
    with pytest.raises(KernelError, match="gelu"):
        kernels.linear(x, weight, bias, "gelu")
