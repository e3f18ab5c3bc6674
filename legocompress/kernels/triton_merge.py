"""The Lego conv on a GPU: PyTorch's conv for the transform, a Triton kernel for the merge."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from legocompress.errors import KernelError

_ACTIVATION_CODES = {"none": 0, "relu": 1, "relu6": 2, "silu": 3}
_PIXELS = 256  # per program


@triton.jit  # type: ignore[untyped-decorator]
def _merge(  # type: ignore[no-untyped-def]
    z, rows, gains, bias, residual, y, n_pixels, n_out, z_rows,
    N_SUM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Compute PIXELS pixels of one output channel of one image."""
    image = tl.program_id(0) // n_out
    channel = tl.program_id(0) % n_out
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < n_pixels
    total = tl.zeros((PIXELS,), dtype=tl.float32)
    for t in tl.static_range(N_SUM):
        row = tl.load(rows + channel * N_SUM + t).to(tl.int64)
        gain = tl.load(gains + channel * N_SUM + t).to(tl.float32)
        source = (image.to(tl.int64) * z_rows + row) * n_pixels + pixel
        total += gain * tl.load(z + source, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + channel).to(tl.float32)
    target = (image.to(tl.int64) * n_out + channel) * n_pixels + pixel
    if HAS_RESIDUAL:
        total += tl.load(residual + target, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == 1:
        total = tl.maximum(total, 0.0)
    if ACTIVATION == 2:
        total = tl.minimum(tl.maximum(total, 0.0), 6.0)
    if ACTIVATION == 3:
        total = total / (1.0 + tl.exp(-total))
    tl.store(y + target, total.to(y.dtype.element_ty), mask=inside)


def lego_conv2d_triton(
    x: Tensor,
    lego_filters: Tensor,
    index: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    activation: str,
) -> Tensor:
    """Split, transform by `F.conv2d`, and merge by one Triton kernel.

    Args:
        x: (N, c, H, W), c a multiple of o.
        lego_filters: (m, q, kh, kw).
        index: (o, n, k) integers in [0, m); their range is not checked here.
        coefficients: (o, n, k).
        bias: (n,) or None.
        residual: (N, n, H', W') or None.
        stride: rows and columns.
        padding: rows and columns of zero pixels on each side.
        dilation: rows and columns.
        activation: 'none', 'relu', 'relu6' or 'silu'.

    Returns:
        (N, n, H', W'), contiguous.

    Raises:
        KernelError: sizes that do not fit each other, or an unknown activation.
    """
    n_split, n_out, n_terms = index.shape
    n_lego, width = lego_filters.shape[:2]
    if activation not in _ACTIVATION_CODES:
        raise KernelError(f"activation {activation!r} is not one of {', '.join(_ACTIVATION_CODES)}")
    if x.shape[1] != n_split * width:
        raise KernelError(f"x has {x.shape[1]} channels; the unit needs {n_split * width}")
    fragments = x.reshape(x.shape[0] * n_split, width, *x.shape[2:])
    z = F.conv2d(fragments, lego_filters, None, stride, padding, dilation).contiguous()
    sizes = (x.shape[0], n_out, *z.shape[2:])
    if residual is not None and tuple(residual.shape) != sizes:
        raise KernelError(f"residual is {tuple(residual.shape)}; the output is {sizes}")
    split = torch.arange(n_split, device=index.device).reshape(-1, 1, 1)
    rows = (index + split * n_lego).permute(1, 0, 2).to(torch.int32).contiguous()
    gains = coefficients.permute(1, 0, 2).contiguous()
    y = torch.empty(sizes, dtype=z.dtype, device=z.device)
    n_pixels = z.shape[2] * z.shape[3]
    unused: Any = y  # stands for an absent tensor; its flag keeps the kernel from reading it
    _merge[(x.shape[0] * n_out, triton.cdiv(n_pixels, _PIXELS))](
        z, rows, gains, unused if bias is None else bias,
        unused if residual is None else residual.contiguous(), y, n_pixels, n_out,
        n_split * n_lego, n_split * n_terms, bias is not None, residual is not None,
        _ACTIVATION_CODES[activation], _PIXELS,
    )  # fmt: skip
    return y
