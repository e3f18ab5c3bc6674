"""The geometry of the page's charts: bars per layer, and curves over epochs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from legocompress.report.numbers import format_change, format_count, format_error, format_size
from legocompress.report.results import LayerReport
from legocompress.state.calibration import Calibration

SLOT, BAR = 10, 7  # width of a layer's column and of its bar, in units of the chart
PANEL, LABEL = 84, 46  # height of a panel's bars and of the label above them, in pixels
CURVE_WIDTH, CURVE_HEIGHT = 300.0, 90.0


@dataclass(frozen=True)
class Bar:
    """A bar of one layer: `top` and `height` in pixels of the chart; `kind` is its CSS class."""

    top: float
    height: float
    kind: str


@dataclass(frozen=True)
class Column:
    """All bars of one layer, and the text that shows while the pointer is on them."""

    x: int
    text: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Panel:
    """The label of one row of bars: what it shows, the value of the highest bar, its place."""

    title: str
    largest: str
    top: int


@dataclass(frozen=True)
class LayerChart:
    """Panels of bars, one column per layer in execution order."""

    panels: tuple[Panel, ...]
    columns: tuple[Column, ...]
    width: int
    height: int
    column_width: int = SLOT
    bar_width: int = BAR


@dataclass(frozen=True)
class _Series:
    """One panel's values: what is drawn pale (before) and strong (after), in the rows' order."""

    title: str
    format_value: Callable[[float | None], str]
    largest: float
    before: Sequence[float | None]
    after: Sequence[float | None]


def draw_layers(
    rows: Sequence[LayerReport],
    calibration: Calibration | None,
    sensitivity: Mapping[str, float] | None,
) -> LayerChart:
    """Draw size, MACs, errors and sensitivity of each layer, in the order of the rows.

    Args:
        rows: one per layer.
        calibration: gives the error of each layer's output, if the network was calibrated.
        sensitivity: a value per layer name; larger means that the layer matters more.
    """
    series = [
        _compare("Size", [r.dense_bits for r in rows], [r.bits for r in rows], format_size),
        _compare(
            "Work, in multiply-adds (MACs)",
            [r.dense_macs for r in rows],
            [r.macs for r in rows],
            format_count,
        ),
    ]
    nothing: list[float | None] = [None] * len(rows)
    errors = [row.weight_error for row in rows]
    if any(error is not None for error in errors):
        series.append(_compare("Error of the weights", nothing, errors, format_error))
    if calibration is not None:
        repairs = {repair.name: repair for repair in calibration.layers}
        before = [repairs[r.name].before if r.name in repairs else None for r in rows]
        after = [repairs[r.name].after if r.name in repairs else None for r in rows]
        title = "Error of the outputs, before and after calibration"
        series.append(_compare(title, before, after, format_error))
    if sensitivity is not None:
        values = [sensitivity.get(row.name) for row in rows]
        series.append(_compare("Sensitivity", nothing, values, format_error))
    panels = tuple(
        Panel(one.title, one.format_value(one.largest), number * (PANEL + LABEL))
        for number, one in enumerate(series)
    )
    columns = tuple(
        Column(position * SLOT, _describe(row, position, series), _stack(row, position, series))
        for position, row in enumerate(rows)
    )
    return LayerChart(panels, columns, SLOT * max(1, len(rows)), len(series) * (PANEL + LABEL))


def _compare(
    title: str,
    before: Sequence[float | None],
    after: Sequence[float | None],
    format_value: Callable[[float | None], str],
) -> _Series:
    values = [v for v in (*before, *after) if v is not None and math.isfinite(v)]
    return _Series(title, format_value, max(values, default=0.0), before, after)


def _describe(row: LayerReport, position: int, series: Sequence[_Series]) -> str:
    """Write the text of a layer's column: its name, then one line per panel with a value."""
    lines = [shorten(row.name or "(root)")]
    for one in series:
        before, after = one.before[position], one.after[position]
        if before is None and after is None:
            continue
        change = format_change(one.format_value, before, after)
        lines.append(
            f"{one.title}: {change or one.format_value(before if after is None else after)}"
        )
    if row.reason is not None:
        lines.append(f"not converted: {shorten(row.reason)}")
    return "\n".join(lines)


def _stack(row: LayerReport, position: int, series: Sequence[_Series]) -> tuple[Bar, ...]:
    """Make the bars of a layer: a pale one for the value before, a strong one for the one after."""
    bars = []
    strong = "kept" if row.n_lego is None else "now"
    for number, one in enumerate(series):
        floor = (number + 1) * (PANEL + LABEL)
        for value, kind in ((one.before[position], "before"), (one.after[position], strong)):
            if value is None or not math.isfinite(value) or value <= 0:
                continue
            if kind == "before" and value == one.after[position]:
                continue  # it would be hidden
            height = round(max(1.0, PANEL * value / one.largest), 1)
            bars.append(Bar(round(floor - height, 1), height, kind))
    return tuple(bars)


@dataclass(frozen=True)
class Curve:
    """One quantity over the epochs: points of a polyline, and its first, best and last values."""

    title: str
    points: str
    first: str
    last: str
    lowest: str
    highest: str
    width: float = CURVE_WIDTH
    height: float = CURVE_HEIGHT


TRAINING_CURVES = {
    "train_loss": "Training loss",
    "eval_top1": "Top-1 on validation images, %",
    "eval_agreement": "Agreement with the original, %",
    "train_index_changes": "Index entries changed in the epoch",
    "lr": "Learning rate",
}


def draw_training(rows: Sequence[Mapping[str, float]]) -> tuple[Curve, ...]:
    """Draw the curves of a training run.

    Args:
        rows: one per epoch, as `RunFolder.read_summary` returns them.
    """
    curves = []
    for key, title in TRAINING_CURVES.items():
        values = [row[key] for row in rows if key in row]
        if values:
            curves.append(_draw_curve(title, values))
    return tuple(curves)


def _draw_curve(title: str, values: Sequence[float]) -> Curve:
    low, high = min(values), max(values)
    step = CURVE_WIDTH / max(1, len(values) - 1)
    margin, span = 4.0, CURVE_HEIGHT - 8.0
    heights = [(value - low) / (high - low) if high > low else 0.5 for value in values]
    points = " ".join(
        f"{step * position:.1f},{margin + span * (1 - height):.1f}"
        for position, height in enumerate(heights)
    )
    if len(values) == 1:  # a single epoch is a line, too
        points = f"{points} {CURVE_WIDTH:.1f},{margin + span / 2:.1f}"
    first, last, lowest, highest = (f"{v:.4g}" for v in (values[0], values[-1], low, high))
    return Curve(title, points, first, last, lowest, highest)


def shorten(text: str, limit: int = 200) -> str:
    """Cut a text of an untrusted file to a length that a page can show."""
    return text if len(text) <= limit else f"{text[:limit]}…"
