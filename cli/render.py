"""Tables and summaries for people, JSON for scripts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import click
import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from legocompress.calibrate import Calibration
from legocompress.compress.plan_types import LayerPlan, Plan
from legocompress.data.evaluation import Evaluation
from legocompress.finetune.recipe import Recipe
from legocompress.report.results import LayerReport, Report
from legocompress.report.versus_dense import BenchmarkRun


def print_json(value: Any) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(value, indent=2, allow_nan=False, default=str))


def count(value: float | None) -> str:
    """A number with a metric letter: 25.56M."""
    if value is None:
        return "?"
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.2f}{letter}"
    return f"{value:.0f}"


def size(bits: float | None) -> str:
    """Bits as decimal bytes: 32.1 MB."""
    if bits is None:
        return "?"
    value = bits / 8
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:.2f} {unit}"
    return f"{value:.0f} B"


def ratio(before: float | None, after: float | None) -> str:
    """before / after as a factor: 3.19x."""
    return f"{before / after:.2f}x" if before and after else "?"


TEXT_COLUMNS = ("layer", "weight", "network", "note", "stays dense because", "form", "route")


def short(value: float | None) -> str:
    """`count` to three digits, for tables."""
    return _scaled(value, ((1e9, "G"), (1e6, "M"), (1e3, "k")), "")


def short_size(bits: float | None) -> str:
    """`size` to three digits, for tables."""
    return _scaled(None if bits is None else bits / 8, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")), "B")


def _scaled(value: float | None, units: tuple[tuple[float, str], ...], smallest: str) -> str:
    if value is None:
        return "?"
    for limit, unit in units:
        if abs(value) >= 0.9995 * limit:
            scaled = value / limit
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{unit}"
    return f"{value:.0f}{smallest}"


def table(columns: list[str], rows: list[list[str]], footer: list[str] | None = None) -> None:
    """Print a table, its last row a total; as wide as it needs where output is no terminal."""
    shown = Table(
        show_footer=footer is not None, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for position, name in enumerate(columns):
        shown.add_column(
            name,
            footer="" if footer is None else footer[position],
            justify="left" if name in TEXT_COLUMNS else "right",
            overflow="fold",
        )
    for row in rows:
        shown.add_row(*row)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=400)
    console.print(shown)


def print_plan(plan: Plan) -> None:
    """The plan: a row per layer, what it becomes or why not, and the totals."""
    rows = [_plan_row(row) for row in plan.rows]
    rows.append(["(other)", "", "", short_size(plan.other_bits), "", "norms, biases"])
    converted = f"{len(plan.layers)} of {len(plan.rows)} layers"
    table(
        ["layer", "weight", "m'/o/k", "ideal size", "MACs", "stays dense because"],
        rows,
        ["total", converted, "", change(short_size, plan.dense_bits, plan.bits),
         change(short, plan.dense_macs, plan.macs), ""],
    )  # fmt: skip
    click.echo(
        f"Training the indices takes N in memory: {size(8 * plan.proxy_bytes)} in fp32, once more "
        "for its gradient\nand for each state of the optimiser; frozen indices take none."
    )
    if plan.reparameterize:
        click.echo("The network has blocks in training form; they are deployed before conversion.")
    if plan.note:
        click.echo(f"Note: {plan.note}")


def change(show: Callable[[float | None], str], before: float | None, after: float | None) -> str:
    """'before → after', or one of them where nothing changes."""
    if before is None or after is None:
        return ""
    return show(before) if before == after else f"{show(before)}→{show(after)}"


def _plan_row(row: LayerPlan) -> list[str]:
    shape = row.shape
    return [
        row.name or "(root)",
        _weight(row.weight_shape, row.groups),
        "" if shape is None else f"{shape.n_lego}/{shape.n_split}/{shape.n_terms}",
        change(short_size, row.dense_bits, row.bits),
        change(short, row.dense_macs, row.macs),
        row.reason or "",
    ]


def _weight(shape: tuple[int, ...], groups: int = 1) -> str:
    return "x".join(map(str, shape)) + (f" g{groups}" if groups > 1 else "")


def print_report(report: Report) -> None:
    """The report: a row per layer that sums to the totals, then the network's numbers."""
    t = report.totals()
    table(
        ["layer", "weight", "m'/o/k", "params", "ideal size", "MACs", "error", "note"],
        [_report_row(row) for row in report.rows],
        ["total", "", "", change(short, t["dense_params"], t["params"]),
         change(short_size, t["dense_bits"], t["bits"]),
         change(short, t["dense_macs"], t["macs"]), _error(t["relative_weight_error"]), ""],
    )  # fmt: skip
    click.echo("ok: m' <= n and |G| + |B| <= |F|. Error: relative, of the weight at conversion.\n")
    print_totals(report)
    for timing in report.latency:
        low, high = timing.quartiles_ms
        spread = (high - low) / timing.median_ms
        click.echo(
            f"measured {timing.form:<10} {timing.ratio:.2f}x the speed of "
            f"{report.latency[0].form} (median of {timing.repeats} interleaved runs, spread "
            f"{100 * spread:.0f} %, {timing.device}, {timing.threads} threads, batch "
            f"{timing.batch}, {timing.dtype})"
        )


def _report_row(row: LayerReport) -> list[str]:
    converted = row.n_lego is not None
    return [
        row.name or "(root)",
        _weight(row.weight_shape),
        f"{row.n_lego}/{row.n_split}/{row.n_terms}" if converted else "",
        change(short, row.dense_params, row.params),
        change(short_size, row.dense_bits, row.bits),
        change(short, row.dense_macs, row.macs),
        _error(row.weight_error),
        _checks(row) if converted else (row.reason or "").partition(":")[0].partition(" (")[0],
    ]


def _checks(row: LayerReport) -> str:
    failing = [
        text
        for holds, text in ((row.fewer_filters, "m' > n"), (row.fewer_bits, "|G|+|B| > |F|"))
        if not holds
    ]
    return "NO: " + ", ".join(failing) if failing else "ok"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def print_totals(report: Report) -> None:
    """The network's numbers, before and after."""
    t = report.totals()
    lines = [
        (
            "params",
            count(t["dense_params"]),
            count(t["params"]),
            ratio(t["dense_params"], t["params"]),
        ),
        ("ideal size", size(t["dense_bits"]), size(t["bits"]), ratio(t["dense_bits"], t["bits"])),
    ]
    if t["stored_bytes"] is not None:
        stored = 8 * t["stored_bytes"]
        lines.append(
            ("stored", size(t["dense_bits"]), size(stored), ratio(t["dense_bits"], stored))
        )
    lines.append(
        ("MACs", count(t["dense_macs"]), count(t["macs"]), ratio(t["dense_macs"], t["macs"]))
    )
    lines.append(
        ("  used filters only", count(t["dense_macs"]), count(t["macs_used_only"]),
         ratio(t["dense_macs"], t["macs_used_only"]))
    )  # fmt: skip
    for name, before, after, factor in lines:
        click.echo(f"{name:<20} {before:>10} -> {after:>10}   {factor:>7}")
    if t["theoretical_speedup"]:
        click.echo(f"{'theoretical speedup':<20} {t['theoretical_speedup']:>24.2f}x")
    if t["fvcore_macs"] is not None:
        agrees = "agrees" if t["fvcore_macs"] == t["macs"] else "differs"
        click.echo(f"{'MACs by fvcore':<20} {count(t['fvcore_macs']):>24}   ({agrees})")
    if t["relative_weight_error"] is not None:
        click.echo(f"{'weight error':<20} {t['relative_weight_error']:>24.4f}")
    failing = [r.name for r in report.rows if r.fewer_filters is False or r.fewer_bits is False]
    if failing:
        click.echo(f"Layers that gain nothing: {', '.join(failing)}")
    if report.note:
        click.echo(f"Note: {report.note}")


def print_skipped(skipped: dict[str, str]) -> None:
    """How many layers stay dense, by reason."""
    reasons = Counter(reason.partition(":")[0] for reason in skipped.values())
    for reason, number in reasons.most_common():
        click.echo(f"  {number:>4} stay dense: {reason}")


def print_recipe(recipe: Recipe, as_json: bool) -> None:
    """A recipe with all its defaults, as YAML that would load again, or as JSON."""
    values = recipe.model_dump(mode="json")
    if as_json:
        print_json(values)
    else:
        click.echo(yaml.safe_dump(values, sort_keys=False), nl=False)


def print_evaluation(found: Evaluation) -> None:
    """Accuracy and agreement, a line each."""
    click.echo(f"images       {found.images}")

    def line(name: str, value: float | None, original: float | None) -> None:
        if value is not None:
            before = "" if original is None else f"   (original {original:.2f} %)"
            click.echo(f"{name:<12} {value:.2f} %{before}")

    line("top-1", found.top1, found.original_top1)
    line("top-5", found.top5, found.original_top5)
    line("agreement", found.agreement, None)
    if found.output_error is not None:
        click.echo(f"output error {found.output_error:.4f} (relative to the original's outputs)")


def print_repairs(found: Calibration) -> None:
    """A row per layer: its output's error before and after its repair."""
    rows = [[r.name, _error(r.before), _error(r.after), r.note or ""] for r in found.layers]
    table(["layer", "error before", "after", "note"], rows)


def print_calibration(found: Calibration) -> None:
    """What the calibration used, and the network's outputs before and after."""
    kind = "synthetic images" if found.synthetic else "unlabelled images"
    if found.crops > 1:
        kind += f" ({found.crops} random crops of each photo)"
    click.echo(f"calibrated with {found.images} {kind}, one in five held out to judge by:")
    click.echo(f"{'output error':<20} {found.error_before:>10.3f} -> {found.error_after:>10.3f}")
    if found.agreement_before is not None and found.agreement_after is not None:
        click.echo(
            f"{'agreement':<20} {found.agreement_before:>8.1f} % -> {found.agreement_after:>8.1f} %"
        )
    if found.accuracy is not None:
        told = found.accuracy
        click.echo(
            f"{'top-1':<20} {told.before:>8.1f} % -> {told.after:>8.1f} %   "
            f"(original {told.original:.1f} %, {told.images} labelled images)"
        )


def print_benchmark(run: BenchmarkRun, layers: bool) -> None:
    """One run: its conditions, a row per form, theory beside measurement, what was left out."""
    plural = "" if run.threads == 1 else "s"
    click.echo(
        f"\nbatch {run.batch}, {run.threads} thread{plural}, {run.dtype}, input "
        f"{_weight(run.input_shape)}, {run.processor} ({run.instructions}); median {run.clock} of "
        f"{run.rounds} interleaved runs"
    )
    rows = [
        [
            form.form,
            f"{form.median_ms:.1f}",
            f"{100 * form.spread:.0f} %",
            f"{form.ratio:.2f}x",
            "?" if form.peak_bytes is None else size(8 * form.peak_bytes),
        ]
        for form in sorted(run.forms, key=lambda form: form.median_ms)
    ]
    table(["form", "ms", "spread", "speed", "peak memory"], rows)
    for name, reason in run.left_out.items():
        click.echo(f"left out: {name}: {reason}")
    if layers:
        table(
            ["layer", "route", "ms", "dense ms", "measured", "theory", "used filters only"],
            [
                [t.name, t.route, f"{t.ms:.2f}", f"{t.dense_ms:.2f}", f"{t.ratio:.2f}x",
                 f"{t.bound:.2f}x", f"{t.bound_used:.2f}x"]
                for t in run.layers
            ],
        )  # fmt: skip
    slower = [t.name for t in run.layers if t.ratio < 1]
    click.echo(
        f"{run.ratio:.2f}x the speed of the strongest dense form ({run.strongest}); theory "
        f"{run.bound:.2f}x, {run.bound_used:.2f}x with unused Lego filters skipped; "
        f"{len(slower)} of {len(run.layers)} Lego layers slower than dense"
    )
    for note in run.notes:
        click.echo(f"Note: {note}")
