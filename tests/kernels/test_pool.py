"""Pooling on the compiled kernels.

Max pooling is tested in tests/deploy/test_plain_site.py, with the other backends.
"""

from __future__ import annotations

import pytest
import torch

from legocompress import kernels
from legocompress.errors import KernelError
from tests.support.kernel_cases import compiled


@compiled
@pytest.mark.parametrize("threads", [1, 2])
def test_the_mean_of_each_map(threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        for height in range(1, 20):
            x = torch.randn(3, 50, height, 7)
            means = kernels.global_mean(x)
            expected = x.double().mean((2, 3), keepdim=True)
            assert torch.allclose(means.double(), expected, atol=1e-6)
        x[1, 2, 3, 4] = torch.nan
        assert kernels.global_mean(x).isnan().nonzero().tolist() == [[1, 2, 0, 0]]
    finally:
        torch.set_num_threads(1)
    for wrong in (x.double(), x[0], x.transpose(2, 3), x[:, :, :0]):
        with pytest.raises(KernelError):
            kernels.global_mean(wrong)
