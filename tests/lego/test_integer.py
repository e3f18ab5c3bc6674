"""The integer arithmetic of quantised layers against the real values that it stands for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from legocompress.lego import integer
from legocompress.lego.algebra import assemble
from legocompress.lego.shape import UnitShape
from legocompress.lego.unit import LegoUnit


def random_map(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def random_conv(shape: UnitShape, out_shift: int = 4, x_zero: int = 7) -> integer.IntegerConv:
    generator = torch.Generator().manual_seed(1)
    is_dense = shape.n_lego == shape.n_out and shape.n_split == shape.n_terms == 1
    slots = (shape.n_split, shape.n_out, shape.n_terms)
    index = torch.randint(0, shape.n_lego, slots, generator=generator)
    if is_dense:
        index = torch.arange(shape.n_out).reshape(1, -1, 1)
    size = (shape.n_lego, shape.width, *shape.kernel)
    return integer.IntegerConv(
        shape=shape,
        is_dense=is_dense,
        filters=torch.randint(-127, 128, size, dtype=torch.int8, generator=generator),
        index=index,
        multipliers=torch.randint(-9000, 9000, slots, dtype=torch.int16, generator=generator),
        shifts=torch.full((shape.n_lego,), 5),
        bias=torch.randint(0, 3000, (shape.n_out,), dtype=torch.int16, generator=generator),
        out_shift=out_shift,
        x_zero=x_zero,
    )


@pytest.mark.parametrize(
    "shape",
    [
        UnitShape(8, 6, (3, 3), 1, 4, 2, 2),
        UnitShape(8, 7, (3, 3), 1, 5, 3, 1),  # the last fragment is padded
        UnitShape(8, 4, (1, 1), 2, 3, 2, 3),  # groups
        UnitShape(8, 8, (3, 3), 1, 8, 1, 1),  # dense
        UnitShape(8, 1, (3, 3), 8, 8, 1, 1),  # depthwise
    ],
)
def test_a_conv_is_the_real_conv_but_for_rounding(shape: UnitShape) -> None:
    conv = random_conv(shape)
    x = random_map(2, shape.channels * shape.groups, 9, 8)
    real = LegoUnit(conv.filters.double(), conv.index, conv.multipliers.double() / 2**15 / 2**5)
    weight = assemble(shape, real)
    y = F.conv2d(x.double() - 7, weight, conv.bias.double(), 2, 1, 1, shape.groups)
    low = torch.floor(y / 2**conv.out_shift).clamp(0, 255)
    q = integer.convolve(conv, x, stride=(2, 2), padding=(1, 1, 1, 1))
    assert q.dtype == torch.uint8
    assert q.double().std() > 5  # the values spread, so that the comparison says something
    assert (q.double() - low).abs().max() <= 1


def test_multiply_high_rounds_as_the_instruction_does() -> None:
    a = torch.tensor([32767, -32768, 1, -1, 3, 20000], dtype=torch.int32)
    b = torch.tensor([32767, 32767, 16384, 16384, 16383, -20000], dtype=torch.int32)
    # ((a * b >> 14) + 1) >> 1, as Intel's manual defines pmulhrsw.
    expected = [((x * y >> 14) + 1) >> 1 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert integer.multiply_high(a, b).tolist() == expected


def test_sums_saturate_in_the_order_of_the_terms() -> None:
    shape = UnitShape(1, 1, (1, 1), 1, 2, 1, 3)
    conv = integer.IntegerConv(
        shape, False,
        filters=torch.tensor([127, -127], dtype=torch.int8).reshape(2, 1, 1, 1),
        index=torch.tensor([0, 0, 1]).reshape(1, 1, 3),
        multipliers=torch.full((1, 1, 3), 32767, dtype=torch.int16),
        shifts=torch.zeros(2, dtype=torch.int64), bias=torch.zeros(1, dtype=torch.int16),
        out_shift=4, x_zero=0,
    )  # fmt: skip
    # 32384 + 32384 saturates to 32767, from which 32384 is then taken.
    q = integer.convolve(conv, torch.full((1, 1, 1, 1), 255, dtype=torch.uint8))
    assert q.item() == (32767 - 32384) >> 4


def test_padding_stands_for_zero() -> None:
    conv = random_conv(UnitShape(4, 4, (3, 3), 1, 4, 1, 1), x_zero=100)
    x = torch.full((1, 4, 5, 5), 100, dtype=torch.uint8)
    q = integer.convolve(conv, x, padding=(1, 1, 1, 1))
    assert torch.equal(q, (conv.bias >> 4).to(torch.uint8).reshape(1, 4, 1, 1).expand_as(q))


def test_a_residual_and_a_table() -> None:
    shape = UnitShape(4, 4, (1, 1), 1, 4, 1, 1)
    plain = random_conv(shape)
    x, residual = random_map(1, 4, 6, 6), random_map(1, 4, 6, 6, seed=3)
    zero = {"residual_multiplier": 4096, "residual_zero": 10}
    fields = {**plain.__dict__, **zero}
    summed = integer.convolve(integer.IntegerConv(**fields), x, residual).int()
    extra = (residual.double() - 10) * 128 * 4096 / 2**15 / 2**4
    y = integer.merge(plain, integer.narrow(plain, integer.transform(
        plain, x, (1, 1), (0, 0, 0, 0), (1, 1)
    ))).int()  # fmt: skip
    inside = (summed > 0) & (summed < 255) & (y > 0) & (y < 255)
    assert inside.any()
    assert ((summed - y) - extra)[inside].abs().max() <= 1
    fields["table"] = torch.arange(255, -1, -1).to(torch.uint8)
    table = integer.convolve(integer.IntegerConv(**fields), x, residual).int()
    assert torch.equal(table, 255 - summed)


def test_maps_of_reals_round_to_even_and_clamp() -> None:
    x = torch.tensor([-1.0, 0.0, 0.25, 0.75, 1.0, 500.0])
    q = integer.quantize_map(x, 0.5, 3)
    assert q.tolist() == [1, 3, 3, 5, 5, 255]
    assert integer.dequantize_map(q, 0.5, 3).tolist() == [-1.0, 0.0, 0.0, 1.0, 1.0, 126.0]


def test_a_linear_layer_is_exact_before_its_two_roundings() -> None:
    generator = np.random.default_rng(0)
    weight = generator.integers(-127, 128, (5, 300)).astype(np.int8)
    x = generator.integers(0, 256, (2, 300)).astype(np.uint8)
    scales = generator.random(5).astype(np.float32)
    bias = generator.random(5).astype(np.float32)
    tensors = [torch.from_numpy(values) for values in (weight, scales, bias)]
    linear = integer.IntegerLinear(tensors[0], tensors[1], tensors[2], x_zero=9)
    y = integer.apply_linear(linear, torch.from_numpy(x))
    sums = (x.astype(np.int64) - 9) @ weight.astype(np.int64).T
    assert np.array_equal(y.numpy(), sums.astype(np.float32) * scales + bias)


def test_sums_means_and_gates_are_the_real_ones_but_for_rounding() -> None:
    a, b = random_map(2, 3, 5, 5), random_map(2, 3, 5, 5, seed=1)
    y = integer.add_maps(a, b, (0, 20), (2048, 4096), (1 << 4) + (1 << 3), 4)
    real = (a.double() * 2048 + (b.double() - 20) * 4096) * 128 / 2**15 / 2**4 + 1
    assert (y.double() - real.clamp(0, 255)).abs().max() <= 0.6
    means = integer.average_maps(a, 10, round(2**24 * 0.5 / 25), 4)
    real = (a.double() - 10).mean((2, 3), keepdim=True) * 0.5 + 4
    assert (means.double() - real.clamp(0, 255)).abs().max() <= 0.51
    gate = random_map(2, 3, 1, 1, seed=2)
    y = integer.scale_maps(a, gate, (0, 0), 8000, 1 << 3, 4)
    real = a.double() * 128 * (gate.double() * 8000 / 2**8) / 2**15 / 2**4
    assert (y.double() - real.clamp(0, 255)).abs().max() <= 0.6
