"""The layout of maps of uint8."""

from __future__ import annotations

import pytest
import torch

from legocompress import kernels
from legocompress.errors import KernelError
from legocompress.kernels.int8_map import SLACK, count_bytes, count_plane_pixels


@pytest.mark.parametrize("border", [0, 1, 3])
def test_a_map_keeps_its_values_and_has_a_border_of_zero_points(border: int) -> None:
    values = torch.randint(0, 256, (2, 5, 6, 7), dtype=torch.uint8)
    x = kernels.lay_out_map(values, border, 9)
    assert torch.equal(kernels.read_map(x), values)
    assert x.data.numel() == count_bytes((2, 5, 6, 7), border)
    planes = x.data[SLACK:-SLACK].reshape(4, count_plane_pixels(6, 7, border), 4)
    pitch = 7 + border
    rows = planes[:, : (6 + 2 * border) * pitch].reshape(4, 6 + 2 * border, pitch, 4)
    assert (rows[:, :border] == 9).all()
    assert (rows[:, border + 6 :] == 9).all()
    assert (rows[:, :, :border] == 9).all()


def test_planes_do_not_fall_into_one_cache_set() -> None:
    assert count_plane_pixels(7, 7, 0) == 80  # 49 pixels: 4 lines, and one to be odd


def test_an_impossible_map_is_refused() -> None:
    for shape, border, zero in (
        ((1, 0, 2, 2), 0, 0),
        ((1, 1, 2, 2), 65, 0),
        ((1, 1, 2, 2), 0, 256),
    ):
        with pytest.raises(KernelError, match="cannot be"):
            kernels.empty_map(shape, border, zero)
