"""Numbers as text."""

from __future__ import annotations

import pytest

from legocompress.report.numbers import (
    format_change,
    format_count,
    format_error,
    format_ratio,
    format_shape,
    format_short_count,
    format_short_size,
    format_size,
)


@pytest.mark.parametrize(
    ("value", "text", "short_text"),
    [
        (None, "?", "?"),
        (7, "7", "7"),
        (999.6, "1000", "1.00k"),
        (25_557_032, "25.56M", "25.6M"),
        (4_089_184_256, "4.09G", "4.09G"),
        (123_456, "123.46k", "123k"),
    ],
)
def test_counts(value: float | None, text: str, short_text: str) -> None:
    assert format_count(value) == text
    assert format_short_count(value) == short_text


def test_sizes_are_given_in_bits_and_written_in_bytes() -> None:
    assert format_size(8 * 32_100_000) == "32.10 MB"
    assert format_size(8 * 12) == "12 B"
    assert format_short_size(8 * 32_100_000) == "32.1MB"
    assert format_size(None) == format_short_size(None) == "?"


def test_ratios_changes_errors_and_shapes() -> None:
    assert format_ratio(6.38, 2.0) == "3.19x"
    assert format_ratio(1.0, None) == format_ratio(1.0, 0.0) == "?"
    assert format_change(format_short_count, 2000, 1000) == "2.00k→1.00k"
    assert format_change(format_short_count, 2000, 2000) == "2.00k"
    assert format_change(format_short_count, 2000, None) == ""
    assert format_error(0.12345) == "0.123"
    assert format_error(None) == ""
    assert format_shape((64, 8, 3, 3), groups=4) == "64x8x3x3 g4"
    assert format_shape((64, 8, 1, 1)) == "64x8x1x1"
