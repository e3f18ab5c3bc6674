"""The backends that can run a deployed conv: one table, `BACKENDS`.

A new backend is one entry of the table, at the end of this file, and its name in
`ConvRoute` of `state.deployment`. All backends compute the same function within rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from legocompress import kernels
from legocompress.deploy.activation import Activation, activate_
from legocompress.deploy.folding import FoldedConv
from legocompress.deploy.memory_format import TORCH_FORMATS
from legocompress.lego.algebra import (
    build_slot_table,
    merge_by_table,
    split_transform_merge,
    transform,
)
from legocompress.state.deployment import ConvRoute, Format

# run(x, residual, overwrite): x (N, c, H, W) and residual (N, n, H', W') or None give
# (N, n, H', W'). With `overwrite` the output may take the residual's memory.
# A runner keeps only the tensors that it needs, never the FoldedConv that it was built from.
Runner = Callable[[Tensor, Tensor | None, bool], Tensor]
ONEDNN_ACTIVATIONS: dict[Activation, tuple[str, list[float]]] = {
    "none": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
    "silu": ("swish", []),
}


@dataclass(frozen=True)
class Backend:
    """One way to run a conv.

    Attributes:
        name: its route in choices and checkpoints.
        applies: whether it can run a conv on inputs of a device and a dtype.
        build: packs the weights for a memory format and the size of an input (N, c, H, W), and
            returns what runs them. Raises RuntimeError where a library refuses the conv.
        is_dense: whether it runs the dense weight, also of a Lego layer.
        is_kernel: whether it is one call of this package's compiled kernels.
    """

    name: ConvRoute
    applies: Callable[[FoldedConv, torch.device, torch.dtype], bool]
    build: Callable[[FoldedConv, Format, Tensor], Runner]
    is_dense: bool = False
    is_kernel: bool = False


def build_assemble(conv: FoldedConv, memory_format: Format, _: Tensor) -> Runner:
    """PyTorch's conv with the dense weight."""
    g, bias, activation = conv.geometry, conv.bias, conv.activation
    torch_format = TORCH_FORMATS[memory_format]
    weight = conv.weight().contiguous(memory_format=torch_format)

    def run(x: Tensor, residual: Tensor | None, overwrite: bool = False) -> Tensor:
        x, padding = g.pad_input(x)
        x = x.contiguous(memory_format=torch_format)
        y = F.conv2d(x, weight, bias, g.stride, padding, g.dilation, g.groups)
        return _add_and_activate_(y, residual, activation)

    return run


def build_onednn(conv: FoldedConv, memory_format: Format, x: Tensor) -> Runner:
    """oneDNN's conv with the dense weight, packed for the size of x."""
    g, bias, activation = conv.geometry, conv.bias, conv.activation
    strides = (list(g.stride), list(g.dilation), g.groups)
    x, padding = g.pad_input(x)
    pack: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # type: ignore[attr-defined]
    weight = pack(
        conv.weight().contiguous(memory_format=torch.channels_last).to_mkldnn(),
        list(padding), *strides, list(x.shape),
    )  # fmt: skip
    convolve = torch.ops.mkldnn._convolution_pointwise.default
    convolve_and_add = torch.ops.mkldnn._convolution_pointwise.binary
    name, scalars = ONEDNN_ACTIVATIONS[activation]
    fuses_sum_and_activation = activation in ("none", "relu")
    after_sum = "relu" if activation == "relu" else None

    def run(x: Tensor, residual: Tensor | None, overwrite: bool = False) -> Tensor:
        x, padding = g.pad_input(x)
        if residual is None:
            y = convolve(x, weight, bias, padding, *strides, name, scalars, "")
        elif fuses_sum_and_activation:
            rest: Any = (bias, padding, *strides, "add", 1.0, after_sum, [], "")
            y = convolve_and_add(x, residual, weight, *rest)
        else:
            y = convolve(x, weight, bias, padding, *strides, "none", [], "")
            y = _add_and_activate_(y, residual, activation)
        # oneDNN returns channels_last.
        return y.contiguous() if memory_format == "nchw" else y  # type: ignore[no-any-return]

    return run


def build_fused(conv: FoldedConv, memory_format: Format, _: Tensor) -> Runner:
    """The compiled kernel; a depthwise conv has a kernel of its own."""
    if conv.is_depthwise:
        return _build_depthwise(conv, memory_format)
    return _build_kernel(conv, memory_format, "direct")


def build_winograd(conv: FoldedConv, memory_format: Format, _: Tensor) -> Runner:
    """The compiled kernel with Winograd's transform."""
    return _build_kernel(conv, memory_format, "winograd")


def build_table(conv: FoldedConv, memory_format: Format, _: Tensor) -> Runner:
    """Split, transform by PyTorch's conv, merge by one embedding_bag."""
    g, activation = conv.geometry, conv.activation
    torch_format = TORCH_FORMATS[memory_format]
    shape, unit, bias = conv.shape, conv.unit, conv.bias
    tables: dict[int, tuple[Tensor, Tensor | None]] = {}  # of the last batch size

    def run(x: Tensor, residual: Tensor | None, overwrite: bool = False) -> Tensor:
        x, padding = g.pad_input(x)
        batch = int(x.shape[0])
        if batch not in tables:
            tables.clear()
            tables[batch] = build_slot_table(shape, unit, batch)
        z = transform(shape, unit.lego_filters, x, g.stride, padding, g.dilation)
        y = merge_by_table(shape, z, tables[batch], bias)
        y = y.contiguous(memory_format=torch_format)
        return _add_and_activate_(y, residual, activation)

    return run


def build_reference(conv: FoldedConv, memory_format: Format, _: Tensor) -> Runner:
    """Split, transform and merge by plain operators of PyTorch."""
    g, activation = conv.geometry, conv.activation
    torch_format = TORCH_FORMATS[memory_format]
    filters = conv.unit.lego_filters.contiguous(memory_format=torch_format)
    shape, bias, unit = conv.shape, conv.bias, conv.unit._replace(lego_filters=filters)

    def run(x: Tensor, residual: Tensor | None, overwrite: bool = False) -> Tensor:
        x, padding = g.pad_input(x)
        x = x.contiguous(memory_format=torch_format)
        y = split_transform_merge(shape, unit, x, bias, g.stride, padding, g.dilation)
        return _add_and_activate_(y, residual, activation)

    return run


def _build_depthwise(conv: FoldedConv, memory_format: Format) -> Runner:
    g, bias, activation = conv.geometry, conv.bias, conv.activation
    weight = conv.unit.lego_filters
    torch_format = TORCH_FORMATS[memory_format]

    def run(x: Tensor, residual: Tensor | None, overwrite: bool = False) -> Tensor:
        x, padding = g.pad_input(x)
        numbers = (g.stride, padding, g.dilation)
        if residual is None:
            y = kernels.depthwise_conv2d(x.contiguous(), weight, bias, *numbers, activation)
        else:
            y = kernels.depthwise_conv2d(x.contiguous(), weight, bias, *numbers)
            y = _add_and_activate_(y, residual, activation)
        return y.contiguous(memory_format=torch_format)

    return run


def _build_kernel(conv: FoldedConv, memory_format: Format, transform: str) -> Runner:
    g, bias, activation = conv.geometry, conv.bias, conv.activation
    torch_format = TORCH_FORMATS[memory_format]
    packed = kernels.pack(conv.shape, *conv.unit, transform=transform, stride=g.stride[0])
    lego_conv2d = kernels.lego_conv2d

    def run(x: Tensor, residual: Tensor | None, overwrite: bool = False) -> Tensor:
        x, padding = g.pad_input(x)
        x = x.contiguous(memory_format=torch_format)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch_format)
        return lego_conv2d(
            x, packed, bias, residual, g.stride, padding, g.dilation, activation, overwrite
        )

    return run


def _add_and_activate_(y: Tensor, residual: Tensor | None, activation: Activation) -> Tensor:
    # y was just computed by the caller, so it may be changed in place.
    if residual is not None:
        y += residual
    return activate_(y, activation)


def _always(conv: FoldedConv, device: torch.device, dtype: torch.dtype) -> bool:
    return True


def _is_lego(conv: FoldedConv, device: torch.device, dtype: torch.dtype) -> bool:
    return conv.is_lego


def _onednn_applies(conv: FoldedConv, device: torch.device, dtype: torch.dtype) -> bool:
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return device.type == "cpu" and dtype == torch.float32 and available


def _fused_applies(conv: FoldedConv, device: torch.device, dtype: torch.dtype) -> bool:
    return _kernel_supports(conv, device, dtype, "direct")


def _winograd_applies(conv: FoldedConv, device: torch.device, dtype: torch.dtype) -> bool:
    return not conv.is_depthwise and _kernel_supports(conv, device, dtype, "winograd")


def _kernel_supports(
    conv: FoldedConv, device: torch.device, dtype: torch.dtype, transform: str
) -> bool:
    if device.type != "cpu" or dtype != torch.float32 or not kernels.available():
        return False
    g = conv.geometry
    return kernels.supports(conv.shape, g.stride, g.padding, g.dilation, transform)


# In the order in which they are tried; of equally fast ones the first is taken.
BACKENDS: dict[ConvRoute, Backend] = {
    backend.name: backend
    for backend in (
        Backend("assemble", _always, build_assemble, is_dense=True),
        Backend("onednn", _onednn_applies, build_onednn, is_dense=True),
        Backend("fused", _fused_applies, build_fused, is_kernel=True),
        Backend("winograd", _winograd_applies, build_winograd, is_kernel=True),
        Backend("table", _is_lego, build_table),
        Backend("reference", _is_lego, build_reference),
    )
}
DENSE_ROUTES = tuple(name for name, backend in BACKENDS.items() if backend.is_dense)
KERNEL_ROUTES = tuple(name for name, backend in BACKENDS.items() if backend.is_kernel)


def possible_routes(
    conv: FoldedConv, device: torch.device, dtype: torch.dtype
) -> tuple[ConvRoute, ...]:
    """The backends that can run a conv on inputs of this device and dtype."""
    return tuple(name for name, b in BACKENDS.items() if b.applies(conv, device, dtype))
