"""The pure math of a Lego unit against naive loops, and its costs against numbers done by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from legocompress.lego.algebra import assemble, cut_fragments, split_transform_merge
from legocompress.lego.costs import (
    count_used_filters,
    dense_macs,
    dense_params,
    lego_bits,
    lego_macs,
    lego_params,
)
from legocompress.lego.shape import UnitShape
from legocompress.lego.unit import LegoUnit

# (n_out, channels, kernel, groups, n_lego, n_split, n_terms)
SHAPES = [
    UnitShape(4, 6, (3, 3), 1, 2, 2, 1),
    UnitShape(6, 6, (1, 1), 1, 4, 3, 2),
    UnitShape(6, 5, (3, 1), 1, 3, 2, 3),  # the last fragment is padded by one channel
    UnitShape(4, 7, (2, 3), 1, 5, 4, 2),  # by one, of width two
    UnitShape(8, 4, (3, 3), 2, 3, 2, 2),
    UnitShape(9, 5, (1, 3), 3, 4, 2, 1),  # groups and padding together
    UnitShape(4, 3, (3, 3), 4, 1, 3, 1),  # a bank of one filter
    UnitShape(4, 8, (3, 3), 1, 6, 1, 3),  # one split
]


def unit(shape: UnitShape, coefficients: bool) -> LegoUnit:
    filters = torch.randn(shape.n_lego, shape.width, *shape.kernel, dtype=torch.float64)
    slots = (shape.n_split, shape.n_out, shape.n_terms)
    index = torch.randint(shape.n_lego, slots)
    gains = torch.randn(slots, dtype=torch.float64) if coefficients else None
    return LegoUnit(filters, index, gains)


def gain(gains: Tensor | None, i: int, j: int, t: int) -> float:
    return 1.0 if gains is None else float(gains[i, j, t])


def slow_assemble(shape: UnitShape, filters: Tensor, index: Tensor, gains: Tensor | None) -> Tensor:
    dense = torch.zeros(shape.n_out, shape.channels, *shape.kernel, dtype=torch.float64)
    for j in range(shape.n_out):
        for channel in range(shape.channels):
            i, place = divmod(channel, shape.width)
            for t in range(shape.n_terms):
                chosen = filters[int(index[i, j, t])]
                dense[j, channel] += gain(gains, i, j, t) * chosen[place]
    return dense


def slow_merge(
    shape: UnitShape, x: Tensor, filters: Tensor, index: Tensor, gains: Tensor | None
) -> Tensor:
    """Every output channel by one small conv a slot, on that output's own group and split."""
    outputs = []
    for j in range(shape.n_out):
        first = j // (shape.n_out // shape.groups) * shape.channels
        total = torch.zeros((), dtype=torch.float64)
        for i in range(shape.n_split):
            start, stop = i * shape.width, min((i + 1) * shape.width, shape.channels)
            part = x[:, first + start : first + stop]
            for t in range(shape.n_terms):
                chosen = filters[int(index[i, j, t])][None, : stop - start]
                total = total + gain(gains, i, j, t) * F.conv2d(part, chosen)
        outputs.append(total)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("coefficients", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_assemble_equals_the_double_loop(shape: UnitShape, coefficients: bool) -> None:
    filters, index, gains = unit(shape, coefficients)
    torch.testing.assert_close(
        assemble(shape, LegoUnit(filters, index, gains)),
        slow_assemble(shape, filters, index, gains),
        rtol=0,
        atol=1e-14,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_assembled_weight_is_contiguous(shape: UnitShape) -> None:
    assert assemble(shape, unit(shape, True)).is_contiguous()


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("coefficients", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_split_transform_merge_equals_the_double_loop(
    shape: UnitShape, coefficients: bool, with_bias: bool
) -> None:
    filters, index, gains = unit(shape, coefficients)
    x = torch.randn(2, shape.groups * shape.channels, 5, 4, dtype=torch.float64)
    bias = torch.randn(shape.n_out, dtype=torch.float64) if with_bias else None
    expected = slow_merge(shape, x, filters, index, gains)
    if bias is not None:
        expected = expected + bias[None, :, None, None]
    actual = split_transform_merge(shape, LegoUnit(filters, index, gains), x, bias)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_split_transform_merge_takes_stride_padding_and_dilation() -> None:
    shape = UnitShape(6, 5, (3, 2), 2, 3, 2, 2)
    filters, index, gains = unit(shape, True)
    x = torch.randn(2, 10, 9, 8, dtype=torch.float64)
    dense = slow_assemble(shape, filters, index, gains)
    where = {"stride": (2, 1), "padding": (1, 3), "dilation": (1, 2)}
    torch.testing.assert_close(
        split_transform_merge(shape, LegoUnit(filters, index, gains), x, None, **where),
        F.conv2d(x, dense, None, groups=2, **where),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize(("channels", "n_split"), [(6, 1), (6, 2), (6, 6), (5, 2), (7, 4), (3, 2)])
def test_fragments_cut_the_channels_in_order_and_pad_with_zeros(
    channels: int, n_split: int
) -> None:
    weight = torch.randn(4, channels, 3, 2, dtype=torch.float64)
    cut = cut_fragments(weight, n_split)
    width = -(-channels // n_split)
    assert cut.shape == (n_split, 4, width, 3, 2)
    for i in range(n_split):
        for place in range(width):
            channel = i * width + place
            expected = weight[:, channel] if channel < channels else torch.zeros(4, 3, 2)
            assert torch.equal(cut[i, :, place], expected.to(torch.float64))


@pytest.mark.parametrize(("channels", "n_split"), [(6, 3), (5, 2), (7, 4)])
def test_a_bank_of_all_fragments_assembles_to_the_weight_itself(
    channels: int, n_split: int
) -> None:
    weight = torch.randn(4, channels, 3, 3)
    shape = UnitShape(4, channels, (3, 3), 1, 4 * n_split, n_split, 1)
    bank = cut_fragments(weight, n_split).reshape(shape.n_lego, shape.width, 3, 3)
    index = torch.arange(shape.n_lego).reshape(n_split, 4, 1)
    assert torch.equal(assemble(shape, LegoUnit(bank, index, None)), weight)


def test_used_filters_counts_each_group_split_and_filter_once() -> None:
    shape = UnitShape(4, 4, (1, 1), 2, 3, 2, 1)
    # Outputs 0 and 1 are group 0, outputs 2 and 3 group 1.
    index = torch.tensor([[0, 0, 1, 2], [2, 1, 1, 1]])[..., None]
    # Split 0: {0} and {1, 2}; split 1: {2, 1} and {1}.
    assert count_used_filters(shape, index) == 6
    assert count_used_filters(shape, torch.zeros_like(index)) == 4


def test_used_filters_looks_at_every_term() -> None:
    shape = UnitShape(2, 4, (1, 1), 1, 5, 1, 2)
    assert count_used_filters(shape, torch.tensor([[[0, 1], [1, 4]]])) == 3


@pytest.mark.parametrize(
    ("n_lego", "bits"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (256, 8), (257, 9)]
)
def test_index_bits(n_lego: int, bits: int) -> None:
    assert UnitShape(512, 4, (1, 1), 1, n_lego, 2, 1).index_bits == bits


def test_costs_of_a_small_unit_by_hand() -> None:
    shape = UnitShape(8, 6, (3, 3), 1, 4, 2, 1)
    assert (shape.width, shape.n_fragments, shape.n_slots, shape.n_filter_values) == (
        3,
        16,
        16,
        108,
    )
    assert dense_params(shape) == 432
    assert lego_params(shape, True) == 108 + 16
    assert lego_params(shape, False) == 108
    assert lego_bits(shape, 32, 16) == 108 * 32 + 16 * (2 + 16) == 3744
    assert lego_bits(shape, 16, 0) == 108 * 16 + 16 * 2 == 1760
    assert dense_macs(shape, 10) == 4320
    # Transform m' * c * kh * kw = 216, merge n * o * k = 16, for each of 10 pixels.
    assert lego_macs(shape, 10) == 2320


def test_costs_with_padding_groups_and_terms_by_hand() -> None:
    shape = UnitShape(8, 5, (3, 1), 2, 3, 2, 3)
    assert (shape.width, shape.n_slots, shape.n_filter_values) == (3, 48, 27)
    assert dense_params(shape) == 8 * 5 * 3
    assert lego_bits(shape, 32, 16) == 27 * 32 + 48 * (2 + 16)
    # Each of 2 groups x 2 splits convolves 3 channels (one padded) with 3 filters of 3 taps.
    assert lego_macs(shape, 7) == (2 * 2 * 3 * 3 * 3 + 48) * 7


def test_compression_is_equation_15_with_indices_in_place_of_one_hot_rows() -> None:
    n, c, d, m, o = 256, 256, 3, 128, 2
    shape = UnitShape(n, c, (d, d), 1, m, o, 1)
    ours = 32 * dense_params(shape) / lego_bits(shape, 32, 0)
    # Eq. 15 in bits: 32 a filter value, one an entry of the (n, o, m) matrix M.
    paper = 32 * n * c * d**2 / (32 * m * (c // o) * d**2 + n * o * m)
    index_only = 32 * n * c * d**2 / (32 * m * (c // o) * d**2 + n * o * 7)
    assert ours == index_only
    assert paper < ours < 4
    assert ours == pytest.approx(paper, rel=0.015)


# Output channels and output pixels of VGG-16's convs on CIFAR-10, the first one excepted.
VGG16 = [
    *[(64, 64, 32), (64, 128, 16), (128, 128, 16), (128, 256, 8), (256, 256, 8), (256, 256, 8)],
    *[(256, 512, 4), (512, 512, 4), (512, 512, 4), (512, 512, 2), (512, 512, 2), (512, 512, 2)],
]


@pytest.mark.parametrize(
    ("o", "m", "millions", "mega_macs"),
    [(2, 0.5, 3.7, 149.4), (2, 0.25, 1.9, 74.7), (4, 0.5, 1.9, 149.4), (4, 0.25, 0.9, 74.7)],
)
def test_vgg16_of_the_paper(o: int, m: float, millions: float, mega_macs: float) -> None:
    units = [(UnitShape(n, c, (3, 3), 1, round(m * n), o, 1), side * side) for c, n, side in VGG16]
    params = sum(lego_params(shape, True) for shape, _ in units) + 3 * 64 * 9 + 512 * 10
    assert params / 1e6 == pytest.approx(millions, abs=0.06)
    # The paper counts a mega as 2^20 (dense: 298.7), and compresses the first conv in this column.
    dense = sum(dense_macs(shape, pixels) for shape, pixels in units)
    assert (dense + 3 * 64 * 9 * 32 * 32) / 2**20 == pytest.approx(298.7, abs=0.1)
    macs = sum(lego_macs(shape, pixels) for shape, pixels in units)
    assert macs / 2**20 == pytest.approx(mega_macs, rel=0.02)
