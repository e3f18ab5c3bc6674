"""Sizes of other methods are computed from the weights alone."""

from __future__ import annotations

from dataclasses import replace

from legocompress.report.html.sizes import compare_sizes
from tests.support.pages import make_pair


def test_sizes_by_hand() -> None:
    _, _, report = make_pair()
    weights = 8 * 3 * 9 + 16 * 8 * 9 + 16 * 16 + 6 * 16
    channels, biases = 8 + 16 + 16 + 6, 8 + 16 + 16 + 6
    original, int8, palette, ours, stored = compare_sizes(replace(report, stored_bytes=77))
    assert original.n_bytes == 4 * (weights + biases)
    assert int8.n_bytes == weights + 4 * channels + 4 * biases
    assert palette.n_bytes == weights / 2 + 4 * 16 * 2 + 4 * biases
    assert ours.n_bytes == report.total("bits") / 8
    assert (stored.n_bytes, stored.kind) == (77, "stored")
    assert [entry.kind for entry in (original, int8, palette)] == ["counted", *["computed"] * 2]
    assert original.share == 1
    assert len(compare_sizes(report)) == 4
