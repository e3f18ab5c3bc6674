"""What a benchmark measured, next to what theory predicts."""

from __future__ import annotations

import click

from legocompress.report.versus_dense import BenchmarkRun

from .numbers import format_shape, format_size
from .tables import print_table


def print_benchmark(run: BenchmarkRun, show_layers: bool) -> None:
    """Print the conditions of a run, its times, what was left out, and the speedup."""
    _print_conditions(run)
    _print_forms(run)
    for name, reason in run.left_out.items():
        click.echo(f"left out: {name}: {reason}")
    if show_layers:
        _print_layers(run)
    n_slower = sum(layer.ratio < 1 for layer in run.layers)
    click.echo(
        f"{run.ratio:.2f}x the speed of the strongest dense form ({run.strongest}); theory "
        f"{run.bound:.2f}x, {run.bound_used:.2f}x with unused Lego filters skipped; "
        f"{n_slower} of {len(run.layers)} Lego layers slower than dense"
    )
    for note in run.notes:
        click.echo(f"Note: {note}")


def _print_conditions(run: BenchmarkRun) -> None:
    plural = "" if run.threads == 1 else "s"
    click.echo(
        f"\nbatch {run.batch}, {run.threads} thread{plural}, {run.dtype}, input "
        f"{format_shape(run.input_shape)}, {run.processor} ({run.instructions}); median "
        f"{run.clock} of {run.rounds} interleaved runs"
    )


def _print_forms(run: BenchmarkRun) -> None:
    rows = [
        [
            form.form,
            f"{form.median_ms:.1f}",
            f"{100 * form.spread:.0f} %",
            f"{form.ratio:.2f}x",
            "?" if form.peak_bytes is None else format_size(8 * form.peak_bytes),
        ]
        for form in sorted(run.forms, key=lambda form: form.median_ms)
    ]
    print_table(["form", "ms", "spread", "speed", "peak memory"], rows)


def _print_layers(run: BenchmarkRun) -> None:
    rows = [
        [
            layer.name,
            layer.route,
            f"{layer.ms:.2f}",
            f"{layer.dense_ms:.2f}",
            f"{layer.ratio:.2f}x",
            f"{layer.bound:.2f}x",
            f"{layer.bound_used:.2f}x",
        ]
        for layer in run.layers
    ]
    columns = ["layer", "route", "ms", "dense ms", "measured", "theory", "used filters only"]
    print_table(columns, rows)
