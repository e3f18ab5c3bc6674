"""Storage dtypes: round filters and coefficients to what a checkpoint can hold."""

from __future__ import annotations

import torch
from torch import Tensor

from legocompress.lego.module import ModelT, lego_modules
from legocompress.spec import FilterDtype

TORCH_DTYPES: dict[FilterDtype, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
}


def balance_scales(filters: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
    """Scale filters up and gains down by one power of two, so that every gain fits into fp16."""
    largest = gains.abs().max().double()
    scale = torch.exp2(torch.ceil(torch.log2(largest))) if largest > 0 else torch.ones(())
    return (filters.double() * scale).to(filters.dtype), (gains.double() / scale).to(gains.dtype)


def round_to_storage(values: Tensor, dtype: FilterDtype) -> Tensor:
    """Round values to what `dtype` can store; the result keeps the dtype of `values`.

    Finite values stay finite. int8 uses one scale per entry of the first axis, that is, per filter.
    """
    if dtype == "int8":
        # With values in fp16 or bf16 the first result may round once more; the second is stable.
        once = dequantize_filters(*quantize_filters(values), values.dtype)
        return dequantize_filters(*quantize_filters(once), values.dtype)
    storage = TORCH_DTYPES[dtype]
    limit = min(torch.finfo(storage).max, torch.finfo(values.dtype).max)
    return values.clamp(-limit, limit).to(storage).to(values.dtype)


@torch.no_grad()
def round_(model: ModelT) -> ModelT:
    """Round the filters and coefficients of every Lego module to their storage dtypes, in place."""
    for _, module in lego_modules(model):
        module.lego_filters.copy_(round_to_storage(module.lego_filters, module.storage_dtype))
        if module.coefficients is not None:
            module.coefficients.copy_(
                round_to_storage(module.coefficients, module.coefficients_dtype)
            )
    return model


def quantize_filters(filters: Tensor) -> tuple[Tensor, Tensor]:
    """Turn filters (m, ...) into int8 values in [-127, 127] and symmetric bf16 scales (m,).

    The largest value of a filter always becomes 127, since bf16 rounds a scale by at most 2^-9.
    Therefore rounding a second time changes nothing.
    """
    exact = filters.detach().to(torch.float64)
    limit = exact.abs().reshape(len(filters), -1).amax(1)
    scales = (limit / 127).clamp(max=torch.finfo(torch.bfloat16).max).to(torch.bfloat16)
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    steps = exact / scales.double().reshape(-1, *[1] * (filters.dim() - 1))
    return steps.round().clamp(-127, 127).to(torch.int8), scales


def dequantize_filters(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo `quantize_filters`, in `dtype`.

    In float32 this is exact, since 7 bits times 8 bits fit its 24.
    """
    limit = torch.finfo(dtype).max
    exact = values.double() * scales.double().reshape(-1, *[1] * (values.dim() - 1))
    return exact.clamp(-limit, limit).to(dtype)
