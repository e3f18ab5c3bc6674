"""Depthwise convs on the compiled kernels: the operator legocompress::depthwise_conv2d."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from legocompress.errors import KernelError
from legocompress.kernels.library import call
from legocompress.kernels.operator import (
    LIBRARY,
    activation_code,
    can_skip_dispatcher,
    output_sizes,
    refuse_gradient,
)
from legocompress.kernels.pack import MAX_TAPS

LIBRARY.define(
    "depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, "
    "int[2] dilation, str activation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check_tensors(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for tensor, n_axes in ((x, 4), (weight, 4), (bias, 1)):
        if tensor is not None and (
            tensor.dtype != torch.float32
            or tensor.is_cuda
            or tensor.dim() != n_axes
            or not tensor.is_contiguous()
        ):
            raise KernelError(
                "the depthwise kernel needs contiguous float32 maps (N, c, H, W) on the CPU"
            )
    n, one, kh, kw = weight.shape
    c = x.shape[1]
    if one != 1 or c < 1 or n % c or kh * kw > MAX_TAPS or (bias is not None and len(bias) != n):
        raise KernelError(
            f"a weight {tuple(weight.shape)} is not that of a depthwise conv of {c} channels with "
            f"at most {MAX_TAPS} taps, or there are not {n} biases"
        )


def _run_compiled(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    _check_tensors(x, weight, bias)
    n, _, kh, kw = weight.shape
    c = x.shape[1]
    sizes = output_sizes(x.shape, weight.shape, stride, padding, dilation)
    if min(sizes[2:]) < 1:
        raise KernelError(f"an input of {tuple(x.shape)} leaves no output pixel")
    y = torch.empty(sizes, dtype=torch.float32)
    if y.numel():
        numbers = (x.shape[0], c, n, *x.shape[2:], *sizes[2:], kh, kw)
        rest = (*stride, *padding, *dilation, activation_code(activation), torch.get_num_threads())
        call("lego_depthwise", (weight, bias, x, y), *numbers, *rest)
    return y


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str = "none",
) -> Tensor:
    """Compute a depthwise conv, in which each output channel reads one input channel, and an
    activation.

    Args:
        x: (N, c, H, W).
        weight: (n, 1, kh, kw), n a multiple of c: n / c output channels per input channel.
        bias: (n,) or None.
        stride: rows and columns.
        padding: rows and columns of zero pixels on each side.
        dilation: rows and columns.
        activation: 'none', 'relu', 'relu6' or 'silu'.

    Returns:
        (N, n, H', W'). All tensors are contiguous float32 on the CPU.

    Raises:
        KernelError: a tensor of another dtype, device, layout or size, an unknown activation, no
            compiled kernels, or a backward pass.
    """
    run = _run_compiled if can_skip_dispatcher(x) else torch.ops.legocompress.depthwise_conv2d
    return run(x, weight, bias, stride, padding, dilation, activation)  # type: ignore[no-any-return]


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    return x.new_empty(output_sizes(x.shape, weight.shape, stride, padding, dilation))


LIBRARY.impl("depthwise_conv2d", _run_compiled, "CPU")
torch.library.register_fake("legocompress::depthwise_conv2d", _fake, lib=LIBRARY)
torch.library.register_autograd("legocompress::depthwise_conv2d", refuse_gradient, lib=LIBRARY)


def count_depthwise_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Count the MACs for fvcore: one per tap and output pixel."""
    n, _, kh, kw = inputs[1].type().sizes()
    batch, _, height, width = outputs[0].type().sizes()
    return int(batch * n * height * width * kh * kw)
