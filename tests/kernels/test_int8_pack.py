"""What the packing of quantised convs refuses."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from legocompress import kernels
from legocompress.errors import KernelError
from legocompress.lego.integer import IntegerLinear
from tests.support.int8_cases import random_integer_conv
from tests.support.kernel_cases import compiled

pytestmark = compiled


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("shifts", 25, "shifts"),
        ("index", 10**6, "index"),
        ("x_zero", 256, "zero points"),
        ("out_shift", 16, "out_shift"),
        ("residual_multiplier", 40000, "residual_multiplier"),
        ("table", torch.zeros(255, dtype=torch.uint8), "table"),
        ("bias", torch.zeros(1, dtype=torch.int32), "bias"),
    ],
)
def test_a_number_out_of_range_is_refused(field: str, value: Any, message: str) -> None:
    conv = random_integer_conv(random.Random(1), "lego")
    now = getattr(conv, field)
    if isinstance(now, torch.Tensor) and isinstance(value, int):
        value = torch.full_like(now, value)
    with pytest.raises(KernelError, match=message):
        kernels.pack_integer_conv(replace(conv, **{field: value}))


def test_sums_that_may_not_fit_are_refused() -> None:
    weight = torch.ones(1, 70000, dtype=torch.int8)
    with pytest.raises(KernelError, match="at most"):
        kernels.pack_integer_linear(IntegerLinear(weight, torch.ones(1), torch.ones(1), 0))


def test_geometry_is_checked() -> None:
    conv = random_integer_conv(random.Random(1), "lego")
    with pytest.raises(KernelError, match="strides"):
        kernels.pack_integer_conv(conv, stride=(0, 1))
