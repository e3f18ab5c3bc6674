"""The sizes that the page compares: measured, ideal, and computed for other methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from legocompress.report.results import LayerReport, Report

SCALE_BITS = 32  # one fp32 scale per output channel
PALETTE_BITS, PALETTE_ENTRIES = 4, 16
PALETTE_ENTRY_BITS = 16  # fp16 values of one palette per layer
SizeKind = Literal["stored", "counted", "computed"]


@dataclass(frozen=True)
class SizeEntry:
    """One form of the network and its size; `share` is relative to the largest form listed.

    Kinds: `stored` are bytes on disk, `counted` follows from the tensors of this network, and
    `computed` is what another method would need, which nobody ran here.
    """

    label: str
    n_bytes: float
    share: float
    kind: SizeKind
    is_ours: bool


def compare_sizes(report: Report) -> tuple[SizeEntry, ...]:
    """List the size of the network, of the dense one, and of two other ways to compress it.

    int8 takes 8 bits per weight and one fp32 scale per output channel; the palette takes 4 bits per
    weight and one table of 16 fp16 values per layer. Norms and biases stay as they are.
    """
    int8_bits = sum(_count_int8_bits(row) for row in report.rows)
    palette_bits = sum(_count_palette_bits(row) for row in report.rows)
    sizes: list[tuple[str, float, SizeKind, bool]] = [
        ("Original", report.total("dense_bits") / 8, "counted", False),
        ("Original in int8", int8_bits / 8, "computed", False),
        ("Original in a 4-bit palette", palette_bits / 8, "computed", False),
        ("This network", report.total("bits") / 8, "counted", True),
    ]
    if report.stored_bytes is not None:
        sizes.append(("This network, files on disk", report.stored_bytes, "stored", True))
    largest = max(n_bytes for _, n_bytes, _, _ in sizes) or 1.0
    return tuple(
        SizeEntry(label, n_bytes, n_bytes / largest, kind, is_ours)
        for label, n_bytes, kind, is_ours in sizes
    )


def _count_int8_bits(row: LayerReport) -> int:
    if not row.weight_shape:
        return row.dense_bits
    return 8 * row.dense_params + SCALE_BITS * row.weight_shape[0]


def _count_palette_bits(row: LayerReport) -> int:
    if not row.weight_shape:
        return row.dense_bits
    return PALETTE_BITS * row.dense_params + PALETTE_ENTRY_BITS * PALETTE_ENTRIES
