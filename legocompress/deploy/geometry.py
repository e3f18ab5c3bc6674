"""The geometry of a conv: kernel, stride, padding of every kind, dilation and groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn

from legocompress.lego.module import LegoModule


@dataclass(frozen=True)
class Geometry:
    """Where a conv applies its filters, as pairs (height, width).

    `padding` is what the conv pads by itself, with zeros. Any other padding is applied to the input
    before the conv: `pad` (left, right, top, bottom) in a mode of `F.pad`, or, if `same`, as much
    as timm's Conv2dSame pads at the size of the input. In these cases `padding` is (0, 0).
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    pad: tuple[int, ...] = ()
    mode: str = "constant"
    same: bool = False

    @classmethod
    def of(cls, layer: nn.Conv2d) -> Geometry:
        """The geometry of a conv, with the paddings 'same' and 'valid' as numbers.

        It reads what the conv's own forward reads, since attributes may have been changed after
        construction: the kernel from the weight, and `_reversed_padding_repeated_twice` only where
        the padding is not zeros.
        """
        stride, dilation = _pair(layer.stride), _pair(layer.dilation)
        unpadded = cls(_kernel(layer), stride, (0, 0), dilation, layer.groups)
        if isinstance(layer, Conv2dSame):
            return replace(unpadded, same=True)
        if layer.padding_mode != "zeros":
            left, right, top, bottom = layer._reversed_padding_repeated_twice
            return replace(unpadded, pad=(left, right, top, bottom), mode=layer.padding_mode)
        if layer.padding == "same":
            return replace(unpadded, **_same_zeros(unpadded))
        padding: Any = 0 if layer.padding == "valid" else layer.padding
        return replace(unpadded, padding=_pair(padding))

    @property
    def pads_before_conv(self) -> bool:
        """Whether an input may have to be padded before the conv."""
        return self.same or any(self.pad)

    def pad_input(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The input, padded where the conv cannot do it, and the padding that is left to the conv.

        Args:
            x: (N, c, H, W).
        """
        if self.same:
            rows, columns = self.same_padding(x, 0), self.same_padding(x, 1)
            if rows % 2 == 0 and columns % 2 == 0:
                return x, (rows // 2, columns // 2)
            return pad_same(x, self.kernel, self.stride, self.dilation), (0, 0)
        if any(self.pad):
            return F.pad(x, self.pad, self.mode), (0, 0)
        return x, self.padding

    def same_padding(self, x: Tensor, axis: int) -> int:
        """Pixels that Conv2dSame adds along an axis, both sides together."""
        size, stride = x.shape[2 + axis], self.stride[axis]
        reach = (self.kernel[axis] - 1) * self.dilation[axis] + 1
        n_outputs = -(-size // stride)
        return max(0, (n_outputs - 1) * stride + reach - size)


def _kernel(layer: nn.Conv2d) -> tuple[int, int]:
    if isinstance(layer, LegoModule):
        return layer.lego_shape.kernel
    height, width = layer.weight.shape[2:]
    return int(height), int(width)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    """A number per axis; one number stands for both axes, as in F.conv2d."""
    values = [value] if isinstance(value, int) else list(value)
    return int(values[0]), int(values[-1])


def _same_zeros(unpadded: Geometry) -> dict[str, Any]:
    """The fields of the padding 'same', which puts the odd pixel to the right and the bottom."""
    rows, columns = (
        (size - 1) * step for size, step in zip(unpadded.kernel, unpadded.dilation, strict=True)
    )
    if rows % 2 == 0 and columns % 2 == 0:
        return {"padding": (rows // 2, columns // 2)}
    left, top = columns // 2, rows // 2
    return {"pad": (left, columns - left, top, rows - top)}
