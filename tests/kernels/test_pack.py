"""Packing a unit, and the units that are refused."""

from __future__ import annotations

import pytest
import torch

from legocompress import kernels
from legocompress.errors import KernelError
from legocompress.lego.shape import UnitShape
from tests.support.kernel_cases import compiled, is_close, make_case


@compiled
def test_unused_filters_are_left_out() -> None:
    case = make_case(m=8, n=8, o=2)
    case.index.fill_(3)
    few = kernels.pack(case.shape, case.lego_filters, case.index, None)
    case.index.copy_(torch.arange(8).reshape(1, 8, 1).expand(2, 8, 1))
    every = kernels.pack(case.shape, case.lego_filters, case.index, None)
    assert few.numel() < every.numel()
    case.index.fill_(3)
    assert is_close(case.run(), case.expected())


@compiled
def test_an_index_out_of_range_is_refused() -> None:
    case = make_case()
    for bad in (-1, 4):
        index = case.index.clone()
        index[1, 3, 0] = bad
        with pytest.raises(KernelError, match=f"index holds {bad}"):
            kernels.pack(case.shape, case.lego_filters, index, None)


def test_which_units_are_supported() -> None:
    case = make_case()
    grouped = UnitShape(8, 3, (3, 3), 2, 4, 1, 1)
    assert kernels.supports(grouped, (1, 1), (1, 1), (1, 1), "direct")
    uneven = UnitShape(8, 3, (3, 3), 2, 4, 2, 1)  # fragments of 2, groups of 3 channels
    assert not kernels.supports(uneven, (1, 1), (1, 1), (1, 1), "direct")
    assert not kernels.supports(case.shape, (1, 1), "same", (1, 1), "direct")
    assert kernels.supports(case.shape, (1, 1), (1, 1), (1, 1), "winograd")
    assert kernels.supports(case.shape, (2, 2), (1, 1), (1, 1), "winograd")
    for stride, dilation in (((2, 1), (1, 1)), ((3, 3), (1, 1)), ((1, 1), (2, 2))):
        assert not kernels.supports(case.shape, stride, (1, 1), dilation, "winograd")
    for kernel, stride in (((1, 1), 1), ((5, 5), 1), ((2, 2), 2), ((9, 9), 2), ((3, 1), 1)):  # type: ignore[assignment]
        shape = UnitShape(8, 6, kernel, 1, 4, 2, 1)
        assert not kernels.supports(shape, (stride, stride), (1, 1), (1, 1), "winograd")


def test_units_that_do_not_fit_are_refused() -> None:
    case = make_case()
    uneven = UnitShape(8, 3, (3, 3), 2, 4, 2, 1)
    with pytest.raises(KernelError, match="groups=2"):
        kernels.pack(uneven, torch.zeros(4, 2, 3, 3), case.index, None)
    with pytest.raises(KernelError, match="index is"):
        kernels.pack(case.shape, case.lego_filters, case.index[:, :4], None)
    with pytest.raises(KernelError, match="float32; index has integers"):
        kernels.pack(case.shape, case.lego_filters, case.index.float(), None)
    with pytest.raises(KernelError, match="not finite"):
        kernels.pack(case.shape, case.lego_filters * float("nan"), case.index, None)
    with pytest.raises(KernelError, match="'fft' is not known"):
        kernels.pack(case.shape, case.lego_filters, case.index, None, transform="fft")


@compiled
def test_a_winograd_unit_is_packed_for_one_stride() -> None:
    case = make_case()
    packed = kernels.pack(
        case.shape, case.lego_filters, case.index, None, transform="winograd", stride=2
    )
    with pytest.raises(KernelError, match="do not fit the packed unit"):
        kernels.lego_conv2d(case.x, packed, None, None, (1, 1), (1, 1), (1, 1), "none")
    with pytest.raises(KernelError, match="stride 3"):
        kernels.pack(
            case.shape, case.lego_filters, case.index, None, transform="winograd", stride=3
        )
