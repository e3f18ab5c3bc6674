"""What a benchmark measured, next to what theory predicts."""

from __future__ import annotations

import click

from legocompress.report.benchmark_run import LEGO, BenchmarkRun
from legocompress.report.numbers import format_shape, format_size

from .tables import print_table


def print_benchmark(run: BenchmarkRun, show_layers: bool) -> None:
    """Print the conditions of a run, its times, what was left out, and the speedup."""
    _print_conditions(run)
    _print_forms(run)
    for name, reason in run.left_out.items():
        click.echo(f"left out: {name}: {reason}")
    if show_layers:
        _print_layers(run)
    _print_comparison(run)
    for note in run.notes:
        click.echo(f"Note: {note}")


def _print_comparison(run: BenchmarkRun) -> None:
    """Print the speed over the fastest form in fp32, and over that of a lower precision."""
    if run.fastest_fp32 != LEGO:
        n_slower = sum(layer.ratio < 1 for layer in run.layers)
        click.echo(
            f"{run.ratio:.2f}x the speed of the fastest dense form in fp32 ({run.fastest_fp32}); "
            f"theory {run.bound:.2f}x, {run.bound_used:.2f}x with unused Lego filters skipped; "
            f"{n_slower} of {len(run.layers)} Lego layers slower than dense"
        )
    reduced = run.fastest_reduced
    if reduced is not None:
        click.echo(
            f"{run.ratio / reduced.ratio:.2f}x the speed of the fastest dense form in bf16 or int8 "
            f"({reduced.form})"
        )
    judged = run.judged_by
    if judged is not None:
        top1 = judged.original_top1
        accuracy = "" if top1 is None else f"; the original's top-1 is {top1:.1f} %"
        click.echo(
            f"agreement with the original on {judged.held_out} held-out photos; int8 calibrated "
            f"with {judged.calibration} others; top-1 on {judged.labelled} images{accuracy}"
        )


def _print_conditions(run: BenchmarkRun) -> None:
    plural = "" if run.threads == 1 else "s"
    click.echo(
        f"\nbatch {run.batch}, {run.threads} thread{plural}, {run.dtype}, input "
        f"{format_shape(run.input_shape)}, {run.processor} ({run.instructions}); median "
        f"{run.clock} of {run.rounds} interleaved runs"
    )


def _print_forms(run: BenchmarkRun) -> None:
    """Print a row per form, with its accuracy if that was measured."""
    columns = ["form", "precision", "ms", "spread", "speed", "peak memory"]
    forms = sorted(run.forms, key=lambda form: form.median_ms)
    rows = [
        [
            form.form,
            form.precision,
            f"{form.median_ms:.1f}",
            f"{100 * form.spread:.0f} %",
            f"{form.ratio:.2f}x",
            "?" if form.peak_bytes is None else format_size(8 * form.peak_bytes),
        ]
        for form in forms
    ]
    if run.judged_by is not None:
        columns += ["agreement", "top-1"]
        for row, form in zip(rows, forms, strict=True):
            row += [_format_percent(form.agreement), _format_percent(form.top1)]
    print_table(columns, rows)


def _format_percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} %"


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
