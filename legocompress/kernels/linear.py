"""Linear layers on the compiled kernels, which read the weights in their ordinary layout."""

from __future__ import annotations

import torch
from torch import Tensor

from legocompress.errors import KernelError
from legocompress.kernels.library import call
from legocompress.kernels.operator import activation_code


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """Compute `torch.nn.functional.linear` and an activation, without a gradient.

    Args:
        x: (N, c).
        weight: (n, c).
        bias: (n,) or None.
        activation: 'none', 'relu', 'relu6' or 'silu'.

    Returns:
        (N, n). All tensors are contiguous float32 on the CPU.

    Raises:
        KernelError: a tensor of another dtype, device, layout or size, an unknown activation, or
            no compiled kernels.
    """
    for tensor in (x, weight, bias):
        if tensor is None:
            continue
        if tensor.dtype != torch.float32 or tensor.is_cuda or not tensor.is_contiguous():
            raise KernelError("the linear kernel needs contiguous float32 tensors on the CPU")
    n, c = weight.shape
    if x.dim() != 2 or x.shape[1] != c or (bias is not None and bias.shape != (n,)):
        raise KernelError(f"x is {tuple(x.shape)}; the linear layer needs (N, {c}) and {n} biases")
    code = activation_code(activation)
    y = torch.empty((x.shape[0], n), dtype=torch.float32)
    if y.numel():
        sizes = (x.shape[0], c, n)
        call("lego_linear", (weight, bias, x, y), *sizes, code, torch.get_num_threads())
    return y
