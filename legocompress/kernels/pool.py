"""Pooling by the compiled kernels, which wakes none of PyTorch's threads."""

from __future__ import annotations

import torch
from torch import Tensor

from legocompress.errors import KernelError
from legocompress.kernels.library import call

MAX_POOL_KERNEL = 32  # kMaxPool in src/lego.h
Pair = tuple[int, int]


def max_pool2d(x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """`torch.nn.functional.max_pool2d` without ceil_mode, the same bits; it has no gradient.

    Args:
        x: (N, c, H, W) float32 on the CPU, contiguous.
        kernel: its height and width, at most 32 each.
        stride: of the windows.
        padding: at most half of the kernel.
        dilation: of the windows.

    Raises:
        KernelError: another input, a geometry out of these bounds, or no compiled kernels.
    """
    _check(x)
    out = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    ]
    if min(out) < 1:
        raise KernelError(f"an input of {tuple(x.shape)} leaves no output pixel")
    y = torch.empty((*x.shape[:2], *out), dtype=torch.float32)
    if x.shape[0] * x.shape[1]:
        sizes = (x.shape[0] * x.shape[1], *x.shape[2:], *out)
        geometry = (*kernel, *stride, *padding, *dilation)
        call("lego_max_pool2d", (x, y), *sizes, *geometry, torch.get_num_threads())
    return y


def global_mean(x: Tensor) -> Tensor:
    """The mean of each map (N, c, H, W), as (N, c, 1, 1); it has no gradient.

    Args:
        x: float32 on the CPU, contiguous, of at least one pixel.

    Raises:
        KernelError: another input, or no compiled kernels.
    """
    _check(x)
    n_maps, size = x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]
    y = torch.empty((*x.shape[:2], 1, 1), dtype=torch.float32)
    if n_maps:
        call("lego_means", (x, y), n_maps, size, torch.get_num_threads())
    return y


def _check(x: Tensor) -> None:
    if x.dtype != torch.float32 or x.device.type != "cpu" or x.dim() != 4 or not x.is_contiguous():
        raise KernelError("the pooling kernels run contiguous float32 maps (N, c, H, W) on the CPU")
