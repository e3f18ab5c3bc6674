"""The sizes of units: splits that do not divide the channels, and layers with nothing to gain."""

from __future__ import annotations

import pytest
from torch import nn

from legocompress.compress.convert import convert_
from legocompress.errors import PlanError, SpecError
from legocompress.lego.costs import lego_bits
from legocompress.lego.shape import UnitShape
from tests.support.planning import (
    net,
    small,
)


@pytest.mark.parametrize("kernel", [1, 3])  # a 1x1 filter is small beside its slots
@pytest.mark.parametrize(("m", "k"), [(0.25, 1), (0.5, 2)])
@pytest.mark.parametrize("channels", [5, 6, 7, 9, 10, 13])
@pytest.mark.parametrize("o", [2, 3, 4, 5])
def test_channels_that_o_does_not_divide_get_the_split_of_fewest_bits(
    o: int, channels: int, m: float, k: int, kernel: int
) -> None:
    model = net(
        nn.Conv2d(16, channels, 1), nn.Conv2d(channels, 16, kernel), nn.Conv2d(16, 60, 1),
        nn.Conv2d(60, 16, 1),
    )  # fmt: skip
    shape = small(model, m=m, o=o, k=k, allow_expansion=True).layers["2"].shape
    assert shape is not None

    def bits(n_split: int) -> int:
        unit = UnitShape(16, channels, (kernel, kernel), 1, round(m * 16), n_split, k)
        return lego_bits(unit, 32, 16)

    if channels % o == 0:
        assert shape.n_split == o
    else:
        assert bits(shape.n_split) == min(bits(s) for s in range(1, o + 1))
    assert (shape.n_lego, shape.n_terms) == (round(m * 16), k)


def test_padding_and_a_smaller_split_both_happen() -> None:
    def split(channels: int, o: int, kernel: int) -> tuple[int, int]:
        model = net(
            nn.Conv2d(16, channels, 1), nn.Conv2d(channels, 64, kernel), nn.Conv2d(64, 60, 1)
        )
        shape = small(model, o=o, m=0.25).layers["2"].shape
        assert shape is not None
        return shape.n_split, shape.width

    assert split(13, 4, 3) == (4, 4)  # padded: narrower filters save more than slots cost
    assert split(13, 4, 1) == (2, 7)  # the other way round: 16*w*32 + 64*o*20 bits
    assert split(6, 4, 3) == (3, 2)  # o = 4 would leave a fragment all padding


def test_an_o_that_divides_nothing_names_values_that_work() -> None:
    model = net(nn.Conv2d(16, 12, 3), nn.Conv2d(12, 12, 3))
    with pytest.raises(SpecError) as error:
        small(model, o=5)
    message = str(error.value)
    assert "o=5 divides the input channels of no layer" in message
    assert "12, 16" in message
    assert message.endswith("values that divide some: 1, 2, 3, 4, 6, 8, 12, 16")


def test_grouped_channels_are_split_inside_their_group() -> None:
    made = small(net(nn.Conv2d(16, 24, 3, groups=4)), o=2)
    assert made.layers["1"].shape == UnitShape(24, 4, (3, 3), 4, 12, 2, 1)
    # Transform m'*c*kh*kw and merge n*o, for 36 pixels.
    assert made.layers["1"].macs == min((12 * 16 * 9 + 48) * 36, 24 * 4 * 9 * 36)


def test_macs_are_never_told_to_rise() -> None:
    made = small(net(nn.Conv2d(16, 16, 1)), m=1, o=1, allow_expansion=True)
    assert made.layers["1"].macs == made.layers["1"].dense_macs == 16 * 16 * 64


def test_a_layer_that_is_too_small_stays_dense() -> None:
    model = net(nn.Conv2d(16, 4, 3), nn.Conv2d(4, 16, 3))
    made = small(model, m=0.25, o=2)
    assert made.skipped["1"] == "too small: 1 Lego filters for 2 splits"
    assert made.layers.keys() == {"2"}


def test_a_layer_that_would_not_shrink_stays_dense_with_its_bits() -> None:
    model = net(nn.Conv2d(16, 2, 1), nn.Conv2d(2, 16, 1))
    # 8 filters of 1 value, 32 slots of 3 + 16 bits; dense 32 values.
    made = small(model, m=0.5, o=2, k=2)
    assert made.skipped["2"] == f"no saving: {8 * 32 + 64 * 19:,} bits as Lego unit, 1,024 dense"
    with pytest.raises(PlanError, match=r"no layer can be converted: .*no saving"):
        convert_(model, made)
    assert small(model, m=0.5, o=2, k=2, allow_expansion=True).layers.keys() == {"1", "2"}


def test_a_bank_of_all_fragments_takes_one_term() -> None:
    made = small(net(nn.Conv2d(16, 8, 3)), m=2, o=2, k=3, allow_expansion=True)
    assert made.layers["1"].shape == UnitShape(8, 16, (3, 3), 1, 16, 2, 1)
