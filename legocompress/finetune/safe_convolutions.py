"""Convolutions that oneDNN may compute wrongly in 16 bits, run in float32 instead.

docs/upstream.md describes the faults; `python -m benchmarks.bf16_amx` shows them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

HALF_DTYPES = (torch.bfloat16, torch.float16)
CONVOLUTIONS: tuple[Callable[..., Tensor], ...] = (torch.conv1d, torch.conv2d)


class SafeConvolutions(TorchFunctionMode):
    """While active, run the convolutions of `is_unsafe` in float32 where they run on a CPU.

    Their backward pass is in float32, too. Every other operation, and everything on a GPU, stays as
    it is. The rule depends on shapes and not on the CPU, so a recipe means the same on every CPU.
    The maps are so narrow that float32 costs next to nothing.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run `func`, in float32 if it is an unsafe convolution."""
        kwargs = kwargs or {}
        if func in CONVOLUTIONS:
            return _convolve(func, *args, **kwargs)
        return func(*args, **kwargs)


def is_unsafe(width: int, kernel: int, stride: int, padding: int | str, dilation: int) -> bool:
    """Whether oneDNN may compute a 16-bit convolution wrongly, by the sizes of its last axis.

    With a stride s > 1 there are two faults (oneDNN 3.12.0):
    - backward weights read memory that nobody wrote where the input is narrower than s
      (AMX and AVX-512);
    - forward gives wrong values where the output is one pixel wide (AMX).
    The other axis does not matter: among 4,978 convolutions of random sizes 425 were wrong, and
    each of them was one of these.
    """
    if stride == 1:
        return False
    if isinstance(padding, str):  # "same" needs a stride of 1, so this is "valid"
        padding = 0
    out_width = (width + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    return width < stride or out_width == 1


def _convolve(
    convolution: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    dtype = _dtype(input)
    sizes = (_last(stride), _last(padding), _last(dilation))
    plain = (stride, padding, dilation, groups)
    if dtype not in HALF_DTYPES or not is_unsafe(input.shape[-1], weight.shape[-1], *sizes):
        return convolution(input, weight, bias, *plain)
    with torch.autocast("cpu", enabled=False):
        bias = None if bias is None else bias.float()
        return convolution(input.float(), weight.float(), bias, *plain).to(dtype)


def _dtype(input: Tensor) -> torch.dtype | None:
    """What a convolution of a CPU tensor is computed in; None on another device."""
    if input.device.type != "cpu":
        return None
    if torch.is_autocast_enabled("cpu") and input.dtype != torch.float64:
        return torch.get_autocast_dtype("cpu")
    return input.dtype


def _last(value: Any) -> Any:
    return value if isinstance(value, (int, str)) else value[-1]
