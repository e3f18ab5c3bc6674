"""The merge on a GPU, in Triton; the transform before it is the library's own conv."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from legocompress.errors import KernelError

_CODES = {"none": 0, "relu": 1, "relu6": 2, "silu": 3}
_PIXELS = 256


@triton.jit  # type: ignore[untyped-decorator]
def _merge(  # type: ignore[no-untyped-def]
    z, rows, gains, bias, residual, y, n_pixels, n_out, z_rows,
    N_SUM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """One output channel of one image, PIXELS pixels of it."""
    image = tl.program_id(0) // n_out
    channel = tl.program_id(0) % n_out
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < n_pixels
    total = tl.zeros((PIXELS,), dtype=tl.float32)
    for t in tl.static_range(N_SUM):
        row = tl.load(rows + channel * N_SUM + t).to(tl.int64)
        gain = tl.load(gains + channel * N_SUM + t).to(tl.float32)
        at = (image.to(tl.int64) * z_rows + row) * n_pixels + pixel
        total += gain * tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + channel).to(tl.float32)
    to = (image.to(tl.int64) * n_out + channel) * n_pixels + pixel
    if HAS_RESIDUAL:
        total += tl.load(residual + to, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == 1:
        total = tl.maximum(total, 0.0)
    if ACTIVATION == 2:
        total = tl.minimum(tl.maximum(total, 0.0), 6.0)
    if ACTIVATION == 3:
        total = total / (1.0 + tl.exp(-total))
    tl.store(y + to, total.to(y.dtype.element_ty), mask=inside)


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
    """Split, transform by F.conv2d, merge by one Triton kernel: (N, n, H', W'), contiguous.

    Args:
        x: (N, c, H, W), c a multiple of o.
        lego_filters: (m, q, kh, kw).
        index: (o, n, k) integers in [0, m); checked by whoever made the unit.
        coefficients: (o, n, k).
        bias: (n,) or None.
        residual: (N, n, H', W') or None.
        stride: of the conv.
        padding: of the conv, zeros.
        dilation: of the conv.
        activation: 'none', 'relu', 'relu6' or 'silu'.

    Raises:
        KernelError: sizes that do not fit, or an unknown activation.
    """
    n_split, n_out, n_terms = index.shape
    n_lego, width = lego_filters.shape[:2]
    if activation not in _CODES:
        raise KernelError(f"activation {activation!r} is not one of {', '.join(_CODES)}")
    if x.shape[1] != n_split * width:
        raise KernelError(f"x has {x.shape[1]} channels; the unit wants {n_split * width}")
    parts = x.reshape(x.shape[0] * n_split, width, *x.shape[2:])
    z = F.conv2d(parts, lego_filters, None, stride, padding, dilation).contiguous()
    sizes = (x.shape[0], n_out, *z.shape[2:])
    if residual is not None and tuple(residual.shape) != sizes:
        raise KernelError(f"residual is {tuple(residual.shape)}; the output is {sizes}")
    split = torch.arange(n_split, device=index.device).reshape(-1, 1, 1)
    rows = (index + split * n_lego).permute(1, 0, 2).to(torch.int32).contiguous()
    gains = coefficients.permute(1, 0, 2).contiguous()
    y = torch.empty(sizes, dtype=z.dtype, device=z.device)
    n_pixels = z.shape[2] * z.shape[3]
    nothing: Any = y  # a pointer that is never read
    _merge[(x.shape[0] * n_out, triton.cdiv(n_pixels, _PIXELS))](
        z, rows, gains, nothing if bias is None else bias,
        nothing if residual is None else residual.contiguous(), y, n_pixels, n_out,
        n_split * n_lego, n_split * n_terms, bias is not None, residual is not None,
        _CODES[activation], _PIXELS,
    )  # fmt: skip
    return y
