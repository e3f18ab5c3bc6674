"""What a compressed network holds: a table of layers, the totals, measured times."""

from __future__ import annotations

import click

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
from legocompress.report.results import LayerReport, Report

from .tables import print_table


def print_report(report: Report) -> None:
    """Print one row per layer, which sum to the totals, then the network's numbers and times."""
    totals = report.totals()
    print_table(
        ["layer", "weight", "m'/o/k", "params", "ideal size", "MACs", "error", "note"],
        [_report_row(row) for row in report.rows],
        [
            "total",
            "",
            "",
            format_change(format_short_count, totals["dense_params"], totals["params"]),
            format_change(format_short_size, totals["dense_bits"], totals["bits"]),
            format_change(format_short_count, totals["dense_macs"], totals["macs"]),
            format_error(totals["relative_weight_error"]),
            "",
        ],
    )
    click.echo("ok: m' <= n and |G| + |B| <= |F|. Error: relative, of the weight at conversion.\n")
    print_totals(report)
    _print_times(report)


def _report_row(row: LayerReport) -> list[str]:
    is_converted = row.n_lego is not None
    reason = (row.reason or "").partition(":")[0].partition(" (")[0]
    return [
        row.name or "(root)",
        format_shape(row.weight_shape),
        f"{row.n_lego}/{row.n_split}/{row.n_terms}" if is_converted else "",
        format_change(format_short_count, row.dense_params, row.params),
        format_change(format_short_size, row.dense_bits, row.bits),
        format_change(format_short_count, row.dense_macs, row.macs),
        format_error(row.weight_error),
        _describe_checks(row) if is_converted else reason,
    ]


def _describe_checks(row: LayerReport) -> str:
    failed_checks = []
    if not row.fewer_filters:
        failed_checks.append("m' > n")
    if not row.fewer_bits:
        failed_checks.append("|G|+|B| > |F|")
    return "NO: " + ", ".join(failed_checks) if failed_checks else "ok"


def print_totals(report: Report) -> None:
    """Print the network's numbers: before, after, and their ratio."""
    totals = report.totals()
    _print_counts("params", totals["dense_params"], totals["params"])
    _print_sizes("ideal size", totals["dense_bits"], totals["bits"])
    if totals["stored_bytes"] is not None:
        _print_sizes("stored", totals["dense_bits"], 8 * totals["stored_bytes"])
    _print_counts("MACs", totals["dense_macs"], totals["macs"])
    _print_counts("  used filters only", totals["dense_macs"], totals["macs_used_only"])
    if totals["theoretical_speedup"]:
        click.echo(f"{'theoretical speedup':<20} {totals['theoretical_speedup']:>24.2f}x")
    if totals["fvcore_macs"] is not None:
        agreement = "agrees" if totals["fvcore_macs"] == totals["macs"] else "differs"
        click.echo(
            f"{'MACs by fvcore':<20} {format_count(totals['fvcore_macs']):>24}   ({agreement})"
        )
    if totals["relative_weight_error"] is not None:
        click.echo(f"{'weight error':<20} {totals['relative_weight_error']:>24.4f}")
    # The checks are None for layers that stay dense.
    failing = [r.name for r in report.rows if r.fewer_filters is False or r.fewer_bits is False]
    if failing:
        click.echo(f"Layers that gain nothing: {', '.join(failing)}")
    if report.note:
        click.echo(f"Note: {report.note}")


def _print_counts(name: str, before: float | None, after: float | None) -> None:
    _print_change(name, format_count(before), format_count(after), format_ratio(before, after))


def _print_sizes(name: str, bits_before: float | None, bits_after: float | None) -> None:
    factor = format_ratio(bits_before, bits_after)
    _print_change(name, format_size(bits_before), format_size(bits_after), factor)


def _print_change(name: str, before: str, after: str, factor: str) -> None:
    click.echo(f"{name:<20} {before:>10} -> {after:>10}   {factor:>7}")


def _print_times(report: Report) -> None:
    for timing in report.latency:
        low, high = timing.quartiles_ms
        spread = (high - low) / timing.median_ms
        click.echo(
            f"measured {timing.form:<10} {timing.ratio:.2f}x the speed of "
            f"{report.latency[0].form} (median of {timing.repeats} interleaved runs, spread "
            f"{100 * spread:.0f} %, {timing.device}, {timing.threads} threads, batch "
            f"{timing.batch}, {timing.dtype})"
        )
