"""The int8 kernels of every instruction set against the functions that define their arithmetic."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from legocompress import kernels
from legocompress.errors import KernelError
from legocompress.lego import integer
from tests.support.int8_cases import random_int8_case
from tests.support.kernel_cases import compiled

ISAS = list(kernels.int8_isas()) if kernels.available() else []
KINDS = ["lego", "dense", "grouped", "grouped lego", "depthwise"]
pytestmark = compiled


@pytest.mark.parametrize("kind", KINDS)
def test_random_convs_equal_the_plain_arithmetic_on_every_instruction_set(kind: str) -> None:
    rnd = random.Random(kind)
    torch.manual_seed(len(kind))
    for _ in range(12 if kind == "lego" else 5):
        case = random_int8_case(rnd, kind)
        expected = case.expected()
        zero = rnd.randint(0, 255)
        whole = kernels.lay_out_map(expected, case.out_border, zero)
        for isa in ISAS:
            torch.set_num_threads(rnd.choice([1, 2, 3]))
            with kernels.use_int8_isa(isa):
                packed = kernels.pack_integer_conv(
                    case.conv, case.stride, case.padding, case.dilation
                )
                x = kernels.lay_out_map(case.x, case.border, case.conv.x_zero)
                residual = None
                if case.residual is not None:
                    residual = kernels.lay_out_map(case.residual, case.out_border, 0)
                y = kernels.convolve_int8(x, packed, residual, case.out_border, zero)
            torch.set_num_threads(1)
            assert torch.equal(kernels.read_map(y), expected), (isa, case)
            if case.out_border and expected.shape[1] % 4 == 0:
                # The border of every plane, too; pixels past the last row do not count.
                assert torch.equal(_planes(y), _planes(whole)), (isa, case)


def _planes(x: kernels.IntegerMap) -> torch.Tensor:
    height, width = x.shape[2:]
    count = (height + 2 * x.border) * (width + x.border) + x.border
    return x.data[1024:-1024].reshape(x.shape[0], x.shape[1] // 4, -1, 4)[:, :, :count]


@pytest.mark.parametrize("isa", ISAS)
def test_the_other_layers_equal_the_plain_arithmetic(isa: str) -> None:
    rnd = random.Random(isa)
    torch.manual_seed(0)
    with kernels.use_int8_isa(isa):
        for _ in range(6):
            check_other_layers(rnd)
    torch.set_num_threads(1)


def random_map(*sizes: int) -> torch.Tensor:
    return torch.randint(0, 256, sizes, dtype=torch.uint8)


def check_other_layers(rnd: random.Random) -> None:
    torch.set_num_threads(rnd.choice([1, 2]))
    size = (rnd.choice([1, 2]), rnd.randint(1, 30), rnd.randint(1, 40), rnd.randint(1, 40))
    border, scale = rnd.randint(0, 3), rnd.random() + 0.01
    zeros = (rnd.randint(0, 255), rnd.randint(0, 255))
    reals = torch.randn(size) * 3
    plain = integer.quantize_map(reals, scale, zeros[0])
    quantized = kernels.quantize_int8(reals, scale, zeros[0], border)
    assert torch.equal(kernels.read_map(quantized), plain)
    expected = integer.dequantize_map(plain, scale, zeros[0])
    assert torch.equal(kernels.dequantize_int8(quantized, scale), expected)

    a, b = random_map(*size), random_map(*size)
    map_a, map_b = (kernels.lay_out_map(x, border, z) for x, z in zip((a, b), zeros, strict=True))
    factors = (rnd.randint(-32767, 32767), rnd.randint(-32767, 32767))
    bias, shift = rnd.randint(-3000, 20000), rnd.randint(0, 7)
    y = kernels.add_maps_int8(map_a, map_b, factors, bias, shift, 5, 3, 200)
    assert torch.equal(
        kernels.read_map(y), integer.add_maps(a, b, zeros, factors, bias, shift, 3, 200)
    )
    gate = random_map(*size[:2], 1, 1)
    map_gate = kernels.lay_out_map(gate, 0, zeros[1])
    y = kernels.scale_maps_int8(map_a, map_gate, 2 * factors[0], bias, shift, 5)
    expected = integer.scale_maps(a, gate, zeros, 2 * factors[0], bias, shift)
    assert torch.equal(kernels.read_map(y), expected)
    table = random_map(256)
    y = kernels.look_up_int8(map_a, table, 9)
    assert torch.equal(kernels.read_map(y), table[a.long()])
    y = kernels.average_maps_int8(map_a, 3 * factors[1], 7)
    expected = integer.average_maps(a, zeros[0], 3 * factors[1], 7)
    assert torch.equal(kernels.read_map(y), expected)

    kernel = (min(size[2], rnd.randint(1, 5)), min(size[3], rnd.randint(1, 5)))
    stride = (rnd.randint(1, 3), rnd.randint(1, 3))
    padding = (rnd.randint(0, kernel[0] // 2), rnd.randint(0, kernel[1] // 2))
    y = kernels.max_pool_int8(map_a, kernel, stride, padding, (1, 1), 2)
    expected = F.max_pool2d(a.float(), kernel, stride, padding).byte()
    assert torch.equal(kernels.read_map(y), expected)
    other = random_map(size[0], rnd.randint(1, 9), *size[2:])
    map_other = kernels.lay_out_map(other, border, zeros[0])
    y = kernels.concatenate_int8([map_other, map_a, map_other])
    assert torch.equal(kernels.read_map(y), torch.cat([other, a, other], 1))
    n = rnd.randint(1, 50)
    weight = torch.randint(-127, 128, (n, size[1]), dtype=torch.int8)
    linear = integer.IntegerLinear(weight, torch.rand(n), torch.randn(n), zeros[1])
    logits = kernels.apply_linear_int8(map_gate, kernels.pack_integer_linear(linear))
    assert torch.equal(logits, integer.apply_linear(linear, gate.flatten(1)))


def test_a_recorded_network_of_int8_layers_runs_again_in_one_call() -> None:
    rnd = random.Random(3)
    torch.manual_seed(3)
    while True:
        case = random_int8_case(rnd, "lego")
        if case.residual is None:
            break
    packed = kernels.pack_integer_conv(case.conv, case.stride, case.padding, case.dilation)

    def run(x: torch.Tensor) -> torch.Tensor:
        y = kernels.quantize_int8(x, 0.1, case.conv.x_zero, case.border)
        return kernels.dequantize_int8(kernels.convolve_int8(y, packed, None, 1, 7), 0.5)

    first, second = torch.randn(2, *case.x.shape).unbind()
    with kernels.recording([first]) as recorder:
        y = run(first)
    tape = kernels.Tape(recorder, [y])
    assert torch.equal(tape(second)[0], run(second))


def test_maps_and_convs_that_do_not_fit_are_refused() -> None:
    torch.manual_seed(0)
    case = random_int8_case(random.Random(8), "lego")
    conv = replace(case.conv, residual_multiplier=0)
    packed = kernels.pack_integer_conv(conv, case.stride, case.padding, case.dilation)
    x = kernels.lay_out_map(case.x, case.border, conv.x_zero)
    with pytest.raises(KernelError, match="zero point"):
        kernels.convolve_int8(replace(x, zero=x.zero ^ 1), packed)
    with pytest.raises(KernelError, match="bytes"):
        kernels.convolve_int8(replace(x, border=x.border + 1), packed)
    with pytest.raises(KernelError, match="damaged"):
        kernels.convolve_int8(x, replace(packed, data=packed.data[:-64].clone()))
    with pytest.raises(KernelError, match="do not run here"), kernels.use_int8_isa("sse9"):
        pass
    summed = replace(conv, residual_multiplier=5)
    packed = kernels.pack_integer_conv(summed, case.stride, case.padding, case.dilation)
    with pytest.raises(KernelError, match="there is none"):
        kernels.convolve_int8(x, packed)
