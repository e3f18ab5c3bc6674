"""`report` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import legocompress as lego
from tests.support.command_line import Run


@pytest.mark.slow
def test_report_prints_what_the_library_measures(run: Run, compressed_folder: Path) -> None:
    ran = run("report", compressed_folder)
    assert (ran.code, ran.err) == (0, "")
    report = lego.measure(lego.load(compressed_folder), path=compressed_folder)
    totals = report.totals()
    assert f"{totals['theoretical_speedup']:.2f}x" in ran.out
    assert f"{totals['relative_weight_error']:.4f}" in ran.out
    assert "(agrees)" in ran.out
    assert all(row.name in ran.out for row in report.rows)
    printed = json.loads(run("report", compressed_folder, "--json").out)
    assert printed == json.loads(
        json.dumps({**report.to_dict(), "calibration": None, "quantization": None})
    )
    assert printed["totals"]["stored_bytes"] == sum(
        f.stat().st_size for f in compressed_folder.iterdir()
    )


@pytest.mark.slow
def test_report_times_the_forms(run: Run, compressed_folder: Path) -> None:
    ran = run("report", compressed_folder, "--repeats", 1)
    assert (ran.code, ran.err) == (0, "")
    lines = [line for line in ran.out.splitlines() if line.startswith("measured ")]
    assert [line.split()[1] for line in lines] == ["dense", "assembled", "reference"]
    assert " 1.00x the speed of dense" in lines[0]
    assert all("1 threads" in line and "batch 1" in line for line in lines)
