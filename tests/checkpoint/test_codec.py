"""Packed indices: every width, and the bytes themselves."""

from __future__ import annotations

import math

import pytest
import torch

from legocompress.checkpoint.codec import pack_index, unpack_index


@pytest.mark.parametrize("bits", range(18))
def test_unpacking_undoes_packing(bits: int) -> None:
    for count in (1, 2, 3, 5, 7, 8, 9, 64, 101):
        index = torch.randint(0, 2**bits, (count,))
        index[0] = 2**bits - 1
        packed = pack_index(index, bits)
        assert packed.dtype == torch.uint8
        assert len(packed) == math.ceil(count * bits / 8)
        assert torch.equal(unpack_index(packed, bits, count), index)


def test_bits_are_packed_least_significant_first() -> None:
    assert pack_index(torch.tensor([5, 2, 7]), 3).tolist() == [0b11_010_101, 0b1]
    assert unpack_index(torch.tensor([0b11_010_101, 0b1], dtype=torch.uint8), 3, 3).tolist() == [
        5,
        2,
        7,
    ]
