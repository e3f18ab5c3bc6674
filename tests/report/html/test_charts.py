"""Charts: the geometry follows from the values."""

from __future__ import annotations

import math

import pytest

from legocompress.report.html.charts import LABEL, PANEL, draw_layers, draw_training
from tests.support.pages import make_pair


def test_bars_are_as_high_as_their_values() -> None:
    _, _, report = make_pair()
    rows = [row for row in report.rows if row.weight_shape]
    sensitivity = {rows[1].name: 0.5, rows[2].name: math.nan}
    chart = draw_layers(rows, None, sensitivity)
    titles = [panel.title for panel in chart.panels]
    assert [t.partition(",")[0] for t in titles] == [
        "Size", "Work", "Error of the weights", "Sensitivity",
    ]  # fmt: skip
    assert chart.height == 4 * (PANEL + LABEL)
    largest = max(row.dense_bits for row in rows)
    for row, column in zip(rows, chart.columns, strict=True):
        floor = LABEL + PANEL
        size = [bar for bar in column.bars if bar.top + bar.height == pytest.approx(floor, abs=0.2)]
        expected = [row.dense_bits, row.bits] if row.n_lego is not None else [row.bits]
        heights = [max(1.0, PANEL * bits / largest) for bits in expected]
        assert [bar.height for bar in size] == pytest.approx(heights, abs=0.06)
        assert [bar.kind for bar in size][-1] == ("kept" if row.n_lego is None else "now")
        assert column.text.startswith(row.name)
    assert "Sensitivity: 0.500" in chart.columns[1].text
    assert sum(bar.top > 3 * (PANEL + LABEL) for c in chart.columns for bar in c.bars) == 1


def test_curves_start_left_and_end_right() -> None:
    curves = draw_training([{"train_loss": 4.0, "lr": 0.1}, {"train_loss": 1.0}, {"train_loss": 2}])
    loss, rate = curves
    points = [tuple(map(float, point.split(","))) for point in loss.points.split()]
    assert [x for x, _ in points] == [0, loss.width / 2, loss.width]
    assert points[0][1] < points[2][1] < points[1][1]  # y runs downwards
    assert (loss.first, loss.last, loss.lowest, loss.highest) == ("4", "2", "1", "4")
    assert rate.points.split()[0].startswith("0.0,")
    assert len(rate.points.split()) == 2
    assert draw_training([]) == ()
