"""Units and calls of the compiled kernel, and their expected outputs."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from legocompress import kernels
from legocompress.lego.algebra import assemble
from legocompress.lego.shape import UnitShape
from legocompress.lego.unit import LegoUnit

# Not compared, since SiLU of minus infinity is NaN in PyTorch, but 0 in the limit.
INFINITE_SILU = ("silu", math.inf)
compiled = pytest.mark.skipif(not kernels.available(), reason=str(kernels.why_unavailable()))
ACTIVATIONS = {"none": lambda v: v, "relu": F.relu, "relu6": F.relu6, "silu": F.silu}


@dataclass
class Case:
    """A unit and a call of it."""

    shape: UnitShape
    lego_filters: Tensor
    index: Tensor
    coefficients: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    x: Tensor
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    activation: str

    def expected(self) -> Tensor:
        """Compute the output with the assembled weight, in float64."""

        def double(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.double()

        unit = LegoUnit(self.lego_filters.double(), self.index, double(self.coefficients))
        weight = assemble(self.shape, unit)
        conv = (self.stride, self.padding, self.dilation)
        y = F.conv2d(self.x.double(), weight, double(self.bias), *conv, self.shape.groups)
        return ACTIVATIONS[self.activation](y if self.residual is None else y + self.residual)

    def run(self, transform: str = "direct") -> Tensor:
        """Compute the output with the compiled kernel."""
        unit = (self.shape, self.lego_filters, self.index, self.coefficients)
        packed = kernels.pack(*unit, transform=transform, stride=self.stride[0])
        conv = (self.stride, self.padding, self.dilation)
        return torch.ops.legocompress.lego_conv2d(
            self.x, packed, self.bias, self.residual, *conv, self.activation
        )


def make_case(
    n: int = 8,
    c: int = 6,
    kernel: tuple[int, int] = (3, 3),
    m: int = 4,
    o: int = 2,
    k: int = 1,
    size: tuple[int, int, int] = (1, 9, 11),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    channels_last: bool = False,
    coefficients: bool = True,
    bias: bool = True,
    residual: bool = False,
    activation: str = "none",
) -> Case:
    """Make a case of random values, with the sizes in the letters of the paper."""
    shape = UnitShape(n, c, kernel, 1, m, o, k)
    x = torch.randn(size[0], c, size[1], size[2])
    spans = [dilation[i] * (kernel[i] - 1) + 1 for i in (0, 1)]
    out = [(size[1 + i] + 2 * padding[i] - spans[i]) // stride[i] + 1 for i in (0, 1)]
    return Case(
        shape,
        torch.randn(m, shape.width, *kernel),
        torch.randint(0, m, (o, n, k)),
        torch.randn(o, n, k) if coefficients else None,
        torch.randn(n) if bias else None,
        torch.randn(size[0], n, *out) if residual else None,
        x.to(memory_format=torch.channels_last) if channels_last else x,
        stride,
        padding,
        dilation,
        activation,
    )


def is_close(y: Tensor, expected: Tensor, tolerance: float = 2e-5) -> bool:
    """Whether the largest error is at most `tolerance` of 1 + the largest expected value."""
    assert y.shape == expected.shape
    worst = (y - expected).abs().max() if y.numel() else torch.tensor(0.0)
    return bool(worst <= tolerance * (1 + expected.abs().max()))


def random_case(rnd: random.Random) -> Case:
    while True:
        kernel = rnd.choice([(1, 1), (1, 1), (3, 3), (3, 3), (2, 3), (5, 1), (5, 5), (1, 7)])
        c, n = rnd.randint(1, 40), rnd.randint(1, 50)
        padding = rnd.choice([(kernel[0] // 2, kernel[1] // 2), (0, 0), (1, 2), (3, 3)])
        dilation = rnd.choice([(1, 1), (1, 1), (2, 2), (1, 3)])
        size = (rnd.choice([1, 1, 2, 3, 9]), *rnd.choice(SIZES))
        if any(size[1 + i] + 2 * padding[i] <= dilation[i] * (kernel[i] - 1) for i in (0, 1)):
            continue
        return make_case(
            n=n, c=c, kernel=kernel, m=rnd.randint(1, n), o=min(c, rnd.randint(1, 4)),
            k=rnd.randint(1, 4), size=size, stride=rnd.choice(STRIDES),
            padding=padding, dilation=dilation, channels_last=rnd.random() < 0.4,
            coefficients=rnd.random() < 0.7, bias=rnd.random() < 0.5, residual=rnd.random() < 0.4,
            activation=rnd.choice(list(ACTIVATIONS)),
        )  # fmt: skip


def random_winograd_case(rnd: random.Random) -> Case:
    while True:
        c, n = rnd.randint(1, 40), rnd.randint(1, 50)
        k, stride = rnd.choice([(3, 1), (3, 1), (2, 1), (4, 1), *((k, 2) for k in range(3, 9))])
        padding = rnd.choice([(k // 2, k // 2), (k // 2, k // 2), (2, 3)])
        size = (rnd.choice([1, 2, 5]), *rnd.choice(SIZES))
        if all(size[1 + i] + 2 * padding[i] >= k for i in (0, 1)):
            return make_case(
                n=n, c=c, kernel=(k, k), m=rnd.randint(1, n), o=min(c, rnd.randint(1, 4)),
                k=rnd.randint(1, 3), size=size, stride=(stride, stride), padding=padding,
                channels_last=rnd.random() < 0.3, residual=rnd.random() < 0.4,
                activation=rnd.choice(list(ACTIVATIONS)),
            )  # fmt: skip


def random_grouped_case(rnd: random.Random) -> Case:
    """A grouped unit, some with one channel per group."""
    groups, o, q = rnd.randint(2, 6), rnd.randint(1, 3), rnd.randint(1, 5)
    n, stride = groups * rnd.randint(1, 6), rnd.choice([1, 2])
    shape = UnitShape(n, o * q, (3, 3), groups, rnd.randint(1, 7), o, rnd.randint(1, 2))
    slots = (o, n, shape.n_terms)
    x = torch.randn(rnd.choice([1, 3]), groups * o * q, *rnd.choice([(5, 9), (13, 17), (28, 28)]))
    return Case(
        shape, torch.randn(shape.n_lego, q, 3, 3), torch.randint(0, shape.n_lego, slots),
        torch.randn(slots), torch.randn(n), None, x, (stride, stride), (1, 1), (1, 1), "relu",
    )  # fmt: skip


STRIDES = [(1, 1), (1, 1), (2, 2), (2, 1), (3, 2)]
SIZES = [(1, 1), (7, 7), (14, 14), (5, 9), (13, 17), (28, 28), (56, 56), (9, 64), (3, 61)]
