"""Random quantised convs for the tests of the int8 kernels."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from legocompress.lego import integer
from legocompress.lego.shape import UnitShape

Four = tuple[int, int, int, int]


@dataclass
class Int8Case:
    """A quantised conv and a call of it."""

    conv: integer.IntegerConv
    x: Tensor
    residual: Tensor | None
    stride: tuple[int, int]
    padding: Four
    dilation: tuple[int, int]
    border: int
    out_border: int

    def expected(self) -> Tensor:
        """The output, by the plain functions that define it."""
        return integer.convolve(
            self.conv, self.x, self.residual, self.stride, self.padding, self.dilation
        )


def random_shape(rnd: random.Random, kind: str) -> UnitShape:
    """The shape of a conv of a kind: lego, dense, grouped, grouped lego or depthwise."""
    kernel = rnd.choice([(1, 1), (1, 1), (3, 3), (3, 3), (2, 3), (5, 1), (7, 7)])
    if kind == "dense":
        n = rnd.randint(1, 120)
        return UnitShape(n, rnd.randint(1, 80), kernel, 1, n, 1, 1)
    if kind == "grouped":
        groups = rnd.randint(2, 4)
        n = groups * rnd.randint(1, 9)
        return UnitShape(n, rnd.randint(1, 9), kernel, groups, n, 1, 1)
    if kind == "grouped lego":
        groups, o = rnd.randint(2, 3), rnd.randint(1, 2)
        n, c = groups * rnd.randint(1, 9), o * rnd.randint(1, 6)
        return UnitShape(n, c, kernel, groups, rnd.randint(1, 5), o, rnd.randint(1, 2))
    if kind == "depthwise":
        n = rnd.randint(1, 21)
        return UnitShape(n, 1, kernel, n, n, 1, 1)
    c = rnd.randint(1, 130)
    o = min(c, rnd.randint(1, 4))
    return UnitShape(rnd.randint(1, 60), c, kernel, 1, rnd.randint(1, 36), o, rnd.randint(1, 4))


def random_integer_conv(rnd: random.Random, kind: str) -> integer.IntegerConv:
    """A conv with values from the whole range of each number."""
    shape = random_shape(rnd, kind)
    is_dense = kind in ("dense", "grouped", "depthwise")
    slots = (shape.n_split, shape.n_out, shape.n_terms)
    size = (shape.n_lego, shape.width, *shape.kernel)
    depth = shape.width * shape.kernel[0] * shape.kernel[1]
    usual_shift = max(0, round(depth**0.5 * 127 * 140 / 20000)).bit_length()
    index = torch.randint(0, shape.n_lego, slots)
    return integer.IntegerConv(
        shape=shape,
        is_dense=is_dense,
        filters=torch.randint(-127, 128, size, dtype=torch.int8),
        index=torch.arange(shape.n_out).reshape(1, -1, 1) if is_dense else index,
        multipliers=torch.randint(-32767, 32768, slots, dtype=torch.int16) // (1 + shape.n_terms),
        shifts=torch.randint(0, usual_shift + 3, (shape.n_lego,)),
        bias=torch.randint(-9000, 20000, (shape.n_out,), dtype=torch.int16),
        out_shift=rnd.randint(0, 7),
        x_zero=rnd.choice([0, rnd.randint(0, 255)]),
        low=rnd.choice([0, rnd.randint(0, 99)]),
        high=rnd.choice([255, rnd.randint(100, 255)]),
        residual_multiplier=rnd.choice([0, rnd.randint(-32767, 32767)]),
        residual_zero=rnd.randint(0, 255),
        table=rnd.choice([None, torch.randint(0, 256, (256,), dtype=torch.uint8)]),
    )


def random_int8_case(rnd: random.Random, kind: str) -> Int8Case:
    """A conv, its geometry and its maps."""
    conv = random_integer_conv(rnd, kind)
    shape = conv.shape
    kh, kw = shape.kernel
    stride = rnd.choice([(1, 1), (1, 1), (2, 2), (1, 2), (3, 2)])
    dilation = rnd.choice([(1, 1), (1, 1), (2, 1), (2, 2)])
    same = ((kw - 1) // 2, (kw - 1) // 2, (kh - 1) // 2, (kh - 1) // 2)
    other = (rnd.randint(0, 3), rnd.randint(0, 3), rnd.randint(0, 3), rnd.randint(0, 3))
    padding = rnd.choice([(0, 0, 0, 0), same, other])
    least = (dilation[0] * (kh - 1) + 1, dilation[1] * (kw - 1) + 1)
    height = least[0] + rnd.choice([rnd.randint(0, 6), rnd.randint(0, 30)])
    width = least[1] + rnd.choice([rnd.randint(0, 6), rnd.randint(0, 30)])
    batch = rnd.choice([1, 1, 2])
    x = torch.randint(0, 256, (batch, shape.groups * shape.channels, height, width)).byte()
    out_h = (height + padding[2] + padding[3] - least[0]) // stride[0] + 1
    out_w = (width + padding[0] + padding[1] - least[1]) // stride[1] + 1
    residual = None
    if conv.residual_multiplier:
        residual = torch.randint(0, 256, (batch, shape.n_out, out_h, out_w)).byte()
    border = rnd.choice([max(padding), max(padding), 0, 1])
    return Int8Case(conv, x, residual, stride, padding, dilation, border, rnd.choice([0, 1, 2]))
