"""The operators legocompress::lego_conv2d (compiled) and ::lego_conv2d_table (plain PyTorch)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from legocompress.errors import KernelError
from legocompress.kernels.library import call

ACTIVATIONS = ("none", "relu", "relu6", "silu")
_ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}

# Typed as Any: its methods carry no annotations.
_LIBRARY: Any = torch.library.Library("legocompress", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "lego_conv2d(Tensor x, Tensor packed, Tensor? bias, Tensor? residual, int[2] stride, "
    "int[2] padding, int[2] dilation, str activation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "lego_conv2d_table(Tensor x, Tensor lego_filters, Tensor index, Tensor? coefficients, "
    "Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, int groups) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _output_sizes(
    x: Tensor,
    packed: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Any, Any, Any, Any]:
    n_out, _, kh, kw, _ = packed.shape
    height = (x.shape[2] + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    width = (x.shape[3] + 2 * padding[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    return x.shape[0], n_out, height, width


def _check(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    sizes: tuple[Any, Any, Any, Any],
    activation: str,
) -> None:
    if activation not in _ACTIVATION_CODES:
        raise KernelError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    for name, tensor in (("x", x), ("bias", bias), ("residual", residual)):
        if tensor is not None and (tensor.dtype != torch.float32 or tensor.device.type != "cpu"):
            raise KernelError(
                f"{name} is {tensor.dtype} on {tensor.device}; the fused kernel runs float32 on "
                "the CPU, other routes run the rest"
            )
    if packed.dtype != torch.uint8 or packed.device.type != "cpu" or not packed.is_contiguous():
        raise KernelError("packed is no buffer of legocompress.kernels.pack on the CPU")
    if bias is not None and tuple(bias.shape) != (sizes[1],):
        raise KernelError(f"bias is {tuple(bias.shape)}; the unit wants {(sizes[1],)}")
    if residual is not None and tuple(residual.shape) != sizes:
        raise KernelError(f"residual is {tuple(residual.shape)}; the output is {sizes}")
    if min(sizes[2:]) < 1:
        raise KernelError(f"an input of {tuple(x.shape)} leaves no output pixel")


def _layout(x: Tensor) -> torch.memory_format:
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _lego_conv2d(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    if x.dim() != 4 or packed.dim() != 5:
        raise KernelError(f"x is {tuple(x.shape)}; the fused kernel wants (B, c, H, W)")
    sizes = _output_sizes(x, packed, stride, padding, dilation)
    _check(x, packed, bias, residual, sizes, activation)
    layout = _layout(x)
    x = x.contiguous(memory_format=layout)
    y = torch.empty(sizes, dtype=torch.float32, memory_format=layout)
    if not sizes[0]:
        return y
    # Read as one contiguous block: any view was copied, and these names keep the copies alive.
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous(memory_format=layout)
    call(
        (
            packed.data_ptr(), packed.numel(), x.data_ptr(), x.shape[1],
            0 if bias is None else bias.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            y.data_ptr(), sizes[0], x.shape[2], x.shape[3], sizes[2], sizes[3],
            *stride, *padding, *dilation,
            layout == torch.channels_last, _ACTIVATION_CODES[activation], torch.get_num_threads(),
        )
    )  # fmt: skip
    return y


def _lego_conv2d_fake(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    sizes = _output_sizes(x, packed, stride, padding, dilation)
    return torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=_layout(x))


def _refuse_gradient(ctx: Any, *gradients: Any) -> Any:
    raise KernelError(
        "the fused kernel has no gradient, since its packed filters cannot learn; train with the "
        "route 'assemble'"
    )


def _lego_conv2d_table(
    x: Tensor,
    lego_filters: Tensor,
    index: Tensor,
    coefficients: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Split, transform by one plain conv, merge by embedding_bag over the intermediate map."""
    n_split, n_out, n_terms = index.shape
    n_lego, width = lego_filters.shape[:2]
    batch, channels, height, columns = x.shape
    n_parts = groups * n_split
    missing = n_parts * width - channels
    if missing:
        x = x.reshape(batch * groups, channels // groups, height, columns)
        x = F.pad(x, (0, 0, 0, 0, 0, missing // groups))
    parts = x.reshape(batch * n_parts, width, height, columns)
    z = F.conv2d(parts, lego_filters, None, stride, padding, dilation)
    out_h, out_w = z.shape[2], z.shape[3]
    table = z.reshape(batch * n_parts * n_lego, out_h * out_w)
    group = torch.arange(n_out, device=index.device) // (n_out // groups)
    split = torch.arange(n_split, device=index.device)
    part = group[None, :] * n_split + split[:, None]
    slots = (index + part[:, :, None] * n_lego).permute(1, 0, 2).reshape(1, n_out, -1)
    image = torch.arange(batch, device=index.device)[:, None, None] * (n_parts * n_lego)
    bags = (slots + image).reshape(batch * n_out, n_split * n_terms)
    gains = None
    if coefficients is not None:
        gains = coefficients.to(z.dtype).permute(1, 0, 2).reshape(1, n_out, -1)
        gains = gains.expand(batch, -1, -1).reshape(bags.shape)
    y = F.embedding_bag(bags, table, mode="sum", per_sample_weights=gains)
    y = y.reshape(batch, n_out, out_h, out_w)
    return y if bias is None else y + bias.reshape(1, -1, 1, 1)


_LIBRARY.impl("lego_conv2d", _lego_conv2d, "CPU")
_LIBRARY.impl("lego_conv2d_table", _lego_conv2d_table, "CompositeImplicitAutograd")
torch.library.register_fake("legocompress::lego_conv2d", _lego_conv2d_fake, lib=_LIBRARY)
torch.library.register_autograd("legocompress::lego_conv2d", _refuse_gradient, lib=_LIBRARY)


def lego_conv2d_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Count for fvcore: one MAC a filter value and a summed row, for each output pixel.

    Read off the packed buffer's size, so up to one part in a hundred too high.
    """
    sizes = outputs[0].type().sizes()
    n_out, n_sum, kh, kw, row_bytes = inputs[1].type().sizes()
    values = (n_out * n_sum * kh * kw * row_bytes - 256) // 4 - 2 * n_out * n_sum
    return int((values + n_out * n_sum) * sizes[0] * sizes[2] * sizes[3])


FVCORE_HANDLES: dict[str, Callable[[list[Any], list[Any]], int]] = {
    "legocompress::lego_conv2d": lego_conv2d_macs
}
