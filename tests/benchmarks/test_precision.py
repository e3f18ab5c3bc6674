"""The script of the precisions: its forms name rivals; table and plot show what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import precision
from benchmarks.common import precision_tables
from legocompress.report.rivals import RIVALS

ROWS = [
    {
        "network": "net",
        "form": form,
        "cells": {"1x1": {"ratio": speed, "spread": 0.02}},
        "bytes": 4_000_000,
        "agreement": agreement,
        "output_error": 0.0312,
        "top1": None,
        "original_top1": 82.0,
    }
    for form, speed, agreement in (("A", 1.0, 100.0), ("B", 0.5, 90.0), ("Lego", 2.0, 95.0))
]


def test_every_form_runs_by_a_rival_or_is_deployed() -> None:
    names = {rival.name for rival in RIVALS}
    for form in precision.FORMS:
        arguments = getattr(form.run, "args", ())
        assert set(arguments) <= names
        assert arguments or form.run is precision.run_deployed


def test_the_table_shows_each_row() -> None:
    lines = precision_tables.format_table([*ROWS, {**ROWS[0], "form": "C", "cells": {}}]).split(
        "\n"
    )
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2] == "| net | A | 1.00x (2 %) | 4.0 | 100.0 % | 0.031 |  | 82.0 % |"
    assert lines[-1].startswith("| net | C |  | 4.0 |")


def test_the_frontier_has_what_no_other_form_beats(tmp_path: Path) -> None:
    points = [(1.0, 100.0), (0.5, 90.0), (2.0, 95.0)]
    assert precision_tables.find_frontier(points) == [(2.0, 95.0), (1.0, 100.0)]


@pytest.mark.slow
def test_the_plot_names_every_form(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    precision_tables.save_plot(ROWS, tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert all(f"<!-- {row['form']} -->" in text for row in ROWS)
