"""Rounding as PyTorch operators, which ONNX writes as QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from legocompress.lego import integer


@torch.library.custom_op(
    "legocompress::round_map", mutates_args=(), schema="(Tensor x, float scale, int zero) -> Tensor"
)
def round_map(x: Tensor, scale: float, zero: int) -> Tensor:
    """The values that a map stands for after rounding to uint8: float32 of the shape of x."""
    return integer.dequantize_map(integer.quantize_map(x, scale, zero), scale, zero)


@torch.library.custom_op(
    "legocompress::round_weight", mutates_args=(), schema="(Tensor weight, Tensor scales) -> Tensor"
)
def round_weight(weight: Tensor, scales: Tensor) -> Tensor:
    """Float32 weights (n, ...) rounded to int8 times a scale per output channel (n,)."""
    column = scales.reshape(-1, *[1] * (weight.dim() - 1))
    return (weight / column).round().clamp(-128, 127) * column


@torch.library.custom_op(
    "legocompress::dequantize", mutates_args=(), schema="(Tensor values, Tensor scales) -> Tensor"
)
def dequantize(values: Tensor, scales: Tensor) -> Tensor:
    """Integers (n, ...), int8 or int32, times a float32 scale per entry of the first axis (n,)."""
    return values.float() * scales.reshape(-1, *[1] * (values.dim() - 1))


@torch.library.custom_op(
    "legocompress::dequantize_filters", mutates_args=(), schema="(Tensor filters) -> Tensor"
)
def dequantize_filters(filters: Tensor) -> Tensor:
    """Int8 filters as float32, without a scale."""
    return filters.float()


@round_map.register_fake
def _(x: Tensor, scale: float, zero: int) -> Tensor:
    return torch.empty_like(x)


@round_weight.register_fake
def _(weight: Tensor, scales: Tensor) -> Tensor:
    return torch.empty_like(weight)


@dequantize.register_fake
def _(values: Tensor, scales: Tensor) -> Tensor:
    return torch.empty_like(values, dtype=torch.float32)


@dequantize_filters.register_fake
def _(filters: Tensor) -> Tensor:
    return torch.empty_like(filters, dtype=torch.float32)


def make_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How torch.onnx writes these operators; needs the packages for ONNX."""
    onnx: Any = importlib.import_module("onnx")
    op: Any = importlib.import_module("onnxscript").opset18

    def write_map(x: Any, scale: float, zero: int) -> Any:
        step = op.Constant(value_float=scale)
        zero_point = op.Constant(
            value=onnx.helper.make_tensor("zero", onnx.TensorProto.UINT8, [], [zero])
        )
        return op.DequantizeLinear(op.QuantizeLinear(x, step, zero_point), step, zero_point)

    def write_zeros(values: Any, kind: Any) -> Any:
        length = int(values.shape[0])
        zeros = onnx.helper.make_tensor("zeros", kind, [length], [0] * length)
        return op.Constant(value=zeros)

    def write_weight(weight: Any, scales: Any) -> Any:
        zeros = write_zeros(scales, onnx.TensorProto.INT8)
        values = op.QuantizeLinear(weight, scales, zeros, axis=0)
        return op.DequantizeLinear(values, scales, zeros, axis=0)

    def write_product(values: Any, scales: Any) -> Any:
        zeros = write_zeros(scales, int(values.dtype))
        return op.DequantizeLinear(values, scales, zeros, axis=0)

    def write_filters(filters: Any) -> Any:
        zero = op.Constant(value=onnx.helper.make_tensor("zero", onnx.TensorProto.INT8, [], [0]))
        return op.DequantizeLinear(filters, op.Constant(value_float=1.0), zero)

    operators = torch.ops.legocompress
    return {
        operators.round_map.default: write_map,
        operators.round_weight.default: write_weight,
        operators.dequantize.default: write_product,
        operators.dequantize_filters.default: write_filters,
    }
