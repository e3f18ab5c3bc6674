"""Pooling on the compiled kernels, which does not wake PyTorch's threads."""

from __future__ import annotations

import torch
from torch import Tensor

from legocompress.errors import KernelError
from legocompress.kernels.library import call

MAX_POOL_KERNEL = 32  # kMaxPool in src/lego.h
Pair = tuple[int, int]


def max_pool2d(x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """Compute `torch.nn.functional.max_pool2d` bit for bit, without ceil_mode or a gradient.

    Args:
        x: (N, c, H, W) float32 on the CPU, contiguous.
        kernel: height and width of the window, at most 32 each.
        stride: rows and columns from one window to the next.
        padding: rows and columns on each side, at most half of the kernel.
        dilation: rows and columns from one element of a window to the next.

    Returns:
        (N, c, H', W'), contiguous.

    Raises:
        KernelError: another kind of input, a geometry outside these bounds, or no compiled
            kernels.
    """
    _check_maps(x)
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
    """Compute the mean of each map, without a gradient.

    Args:
        x: (N, c, H, W) float32 on the CPU, contiguous, of at least one pixel.

    Returns:
        (N, c, 1, 1).

    Raises:
        KernelError: another kind of input, or no compiled kernels.
    """
    _check_maps(x)
    n_maps, size = x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]
    y = torch.empty((*x.shape[:2], 1, 1), dtype=torch.float32)
    if n_maps:
        call("lego_means", (x, y), n_maps, size, torch.get_num_threads())
    return y


def _check_maps(x: Tensor) -> None:
    if x.dtype != torch.float32 or x.device.type != "cpu" or x.dim() != 4 or not x.is_contiguous():
        raise KernelError(
            "the pooling kernels need contiguous float32 maps (N, c, H, W) on the CPU"
        )
