"""The operators legocompress::lego_conv2d (compiled) and ::lego_conv2d_table (plain PyTorch)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from legocompress.errors import KernelError
from legocompress.kernels.library import call

ACTIVATIONS = ("none", "relu", "relu6", "silu")  # in the order of their codes in src/lego.h

# Typed as Any: its methods carry no annotations.
LIBRARY: Any = torch.library.Library("legocompress", "DEF")  # type: ignore[no-untyped-call]
LIBRARY.define(
    "lego_conv2d(Tensor x, Tensor packed, Tensor? bias, Tensor? residual, int[2] stride, "
    "int[2] padding, int[2] dilation, str activation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "lego_conv2d_table(Tensor x, Tensor lego_filters, Tensor index, Tensor? coefficients, "
    "Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, int groups) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def activation_code(activation: str) -> int:
    """The number of an activation in the compiled library.

    Raises:
        KernelError: the activation is not one of ACTIVATIONS.
    """
    if activation not in ACTIVATIONS:
        raise KernelError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS.index(activation)


def output_sizes(
    x: Sequence[Any],
    weight: Sequence[Any],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Any, Any, Any, Any]:
    """Sizes (N, n, H', W') of a conv's output.

    Args:
        x: sizes (N, c, H, W) of the input.
        weight: sizes (n, _, kh, kw) of a weight, or (n, _, kh, kw, _) of a packed unit.
        stride: rows and columns.
        padding: rows and columns of zero pixels on each side.
        dilation: rows and columns.
    """
    kh, kw = weight[2:4]
    height = (x[2] + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    width = (x[3] + 2 * padding[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    return x[0], weight[0], height, width


def _memory_format(x: Tensor) -> torch.memory_format:
    """Channels last if x is, else contiguous; contiguous if x is both."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


@functools.lru_cache(maxsize=4096)
def _size_arguments(
    x: tuple[int, ...],
    packed: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[tuple[int, int, int, int], tuple[int, ...]]:
    """Sizes of the output, and the fields from `batch` to `dilation_w` of the struct LegoCall."""
    if len(x) != 4 or len(packed) != 5:
        raise KernelError(f"x is {x}; the fused kernel needs (B, c, H, W)")
    sizes = output_sizes(x, packed, stride, padding, dilation)
    if min(sizes[2:]) < 1:
        raise KernelError(f"an input of {x} leaves no output pixel")
    return sizes, (x[0], x[2], x[3], *sizes[2:], *stride, *padding, *dilation)


def _check_tensor(name: str, tensor: Tensor, sizes: tuple[int, ...] | None) -> None:
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise KernelError(
            f"{name} is {tensor.dtype} on {tensor.device}; the fused kernel runs float32 on "
            "the CPU, other routes run the rest"
        )
    if sizes is not None and tensor.shape != sizes:
        raise KernelError(f"{name} is {tuple(tensor.shape)}; the unit needs {sizes}")


def _run_compiled(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    overwrite: bool = False,
) -> Tensor:
    sizes, numbers = _size_arguments(
        x.shape, packed.shape, tuple(stride), tuple(padding), tuple(dilation)
    )
    code = activation_code(activation)
    if packed.dtype != torch.uint8 or packed.is_cuda or not packed.is_contiguous():
        raise KernelError("packed is not a buffer of legocompress.kernels.pack on the CPU")
    _check_tensor("x", x, None)
    channels_last = False
    if not x.is_contiguous():
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        x = x if channels_last else x.contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    # The kernel reads contiguous blocks.
    if bias is not None:
        _check_tensor("bias", bias, sizes[1:2])
        bias = bias.contiguous()
    if residual is not None:
        _check_tensor("residual", residual, sizes)
        residual = residual.contiguous(memory_format=layout)
    if overwrite and residual is not None and residual.data_ptr() != x.data_ptr():
        y = residual
    else:
        y = torch.empty(sizes, dtype=torch.float32, memory_format=layout)
    if sizes[0]:
        tensors = (packed, bias, x, residual, y)
        rest = (channels_last, code, torch.get_num_threads())
        call("lego_conv2d", tensors, packed.numel(), x.shape[1], *numbers, *rest)
    return y


def can_skip_dispatcher(x: Tensor) -> bool:
    """Whether PyTorch's dispatcher would only pass the call on, so that it can be skipped.

    The dispatcher costs a Python operator 20 to 40 microseconds per call. It is needed for
    gradients, tracing, compilation, dispatch modes and subclasses of Tensor.
    """
    return not (
        type(x) is not Tensor
        or torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or torch._C._len_torch_dispatch_stack()
    )


def lego_conv2d(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    overwrite: bool = False,
) -> Tensor:
    """Run a packed unit: the operator of this name, without PyTorch's dispatcher where possible.

    Args:
        x: (B, c, H, W) float32, contiguous or channels last.
        packed: the unit, packed by `pack`.
        bias: (n,) or None.
        residual: (B, n, H', W'), added before the activation, or None.
        stride: rows and columns.
        padding: rows and columns of zero pixels on each side.
        dilation: rows and columns.
        activation: 'none', 'relu', 'relu6' or 'silu'.
        overwrite: allow writing the output into the residual's memory. Set it only if the
            residual is not read afterwards and shares no memory with x.

    Returns:
        (B, n, H', W') in the memory format of x.

    Raises:
        KernelError: a tensor of another dtype, device or size, or a damaged packed buffer.
    """
    if not can_skip_dispatcher(x):
        return torch.ops.legocompress.lego_conv2d(  # type: ignore[no-any-return]
            x, packed, bias, residual, stride, padding, dilation, activation
        )
    return _run_compiled(
        x, packed, bias, residual, stride, padding, dilation, activation, overwrite
    )


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
    sizes = output_sizes(x.shape, packed.shape, stride, padding, dilation)
    return torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))


def refuse_gradient(ctx: Any, *gradients: Any) -> Any:
    """Raise KernelError: the backward pass of every compiled operator."""
    raise KernelError(
        "the compiled kernels have no gradient, since packed filters cannot learn; train with the "
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
    """Split, transform by one plain conv, merge by `embedding_bag` over the intermediate map Z.

    Each fragment of each image becomes one input of the conv. `embedding_bag` then reads Z as a
    table with one row per (image, fragment, Lego filter), and sums o * k rows per output map.
    """
    n_split, n_out, _ = index.shape
    n_lego, width = lego_filters.shape[:2]
    batch, channels, height, columns = x.shape
    n_fragments = groups * n_split
    missing = n_fragments * width - channels
    if missing:
        x = x.reshape(batch * groups, channels // groups, height, columns)
        x = F.pad(x, (0, 0, 0, 0, 0, missing // groups))
    fragments = x.reshape(batch * n_fragments, width, height, columns)
    z = F.conv2d(fragments, lego_filters, None, stride, padding, dilation)
    out_h, out_w = z.shape[2], z.shape[3]
    table = z.reshape(batch * n_fragments * n_lego, out_h * out_w)
    bags = _table_rows(index, batch, n_lego, groups)
    gains = None
    if coefficients is not None:
        gains = coefficients.to(z.dtype).permute(1, 0, 2).reshape(1, n_out, -1)
        gains = gains.expand(batch, -1, -1).reshape(bags.shape)
    y = F.embedding_bag(bags, table, mode="sum", per_sample_weights=gains)
    y = y.reshape(batch, n_out, out_h, out_w)
    return y if bias is None else y + bias.reshape(1, -1, 1, 1)


def _table_rows(index: Tensor, batch: int, n_lego: int, groups: int) -> Tensor:
    """Rows of the table that each output map sums: (batch * n, o * k).

    The row of (image, group g, split i, Lego filter f) is
    ((image * groups + g) * o + i) * n_lego + f.
    """
    n_split, n_out, n_terms = index.shape
    group = torch.arange(n_out, device=index.device) // (n_out // groups)
    split = torch.arange(n_split, device=index.device)
    fragment = group[None, :] * n_split + split[:, None]
    slots = (index + fragment[:, :, None] * n_lego).permute(1, 0, 2).reshape(1, n_out, -1)
    image = torch.arange(batch, device=index.device)[:, None, None] * (groups * n_split * n_lego)
    return (slots + image).reshape(batch * n_out, n_split * n_terms)


LIBRARY.impl("lego_conv2d", _run_compiled, "CPU")
LIBRARY.impl("lego_conv2d_table", _lego_conv2d_table, "CompositeImplicitAutograd")
torch.library.register_fake("legocompress::lego_conv2d", _lego_conv2d_fake, lib=LIBRARY)
torch.library.register_autograd("legocompress::lego_conv2d", refuse_gradient, lib=LIBRARY)


def count_lego_conv2d_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Count the MACs for fvcore: one per filter value and one per summed row of Z, for each output
    pixel.

    The number of filter values is derived from the size of the packed buffer, whose padding counts
    too: the result is up to 3 % high for small units.
    """
    sizes = outputs[0].type().sizes()
    n_out, n_sum, kh, kw, row_bytes = inputs[1].type().sizes()
    values = (n_out * n_sum * kh * kw * row_bytes - 256) // 4 - 2 * n_out * n_sum
    return int((values + n_out * n_sum) * sizes[0] * sizes[2] * sizes[3])
