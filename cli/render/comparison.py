"""Networks side by side."""

from __future__ import annotations

import click

from legocompress.report.compare import Comparison, ComparisonRow
from legocompress.report.numbers import format_count, format_shape, format_size

from .tables import print_table

KINDS = {"lego": "Lego, deployed", "dense": "dense, deployed", "onnx": "ONNX Runtime"}


def print_comparison(comparison: Comparison) -> None:
    """Print one row per network, and the conditions of the measurement."""
    columns = ["network", "form", "bytes", "MACs", "ms", "spread", "speed", "agreement", "top-1"]
    print_table(columns, [_make_row(row) for row in comparison.rows])
    plural = "" if comparison.threads == 1 else "s"
    click.echo(
        f"speed and agreement: against {comparison.rows[0].name}. Times: median of "
        f"{comparison.rounds} interleaved runs, {comparison.threads} thread{plural}, input "
        f"{format_shape(comparison.image_shape)}, float32."
    )
    if comparison.images:
        click.echo(f"agreement on {comparison.images} images")
    if comparison.labelled:
        click.echo(f"top-1 on {comparison.labelled} labelled images")
    for note in comparison.notes:
        click.echo(f"Note: {note}")


def _make_row(row: ComparisonRow) -> list[str]:
    return [
        row.name,
        KINDS[row.kind],
        format_size(8 * row.n_bytes),
        format_count(row.macs),
        f"{row.median_ms:.1f}",
        f"{100 * row.spread:.0f} %",
        f"{row.speedup:.2f}x",
        "" if row.agreement is None else f"{row.agreement:.1f} %",
        "" if row.top1 is None else f"{row.top1:.1f} %",
    ]
