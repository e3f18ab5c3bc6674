"""`demo`: it runs, and its numbers are those of the library."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from legocompress_cli.demo import SETTINGS

import legocompress as lego
from tests.support.command_line import DENSE, SAMPLE, Run


@pytest.mark.slow
def test_the_demo_prints_the_numbers_of_the_library(run: Run, tmp_path: Path) -> None:
    ran = run("demo", "--out", tmp_path / "kept")
    assert (ran.code, ran.err) == (0, "")
    names = [f"m{spec.m:g}-o{spec.o}-k{spec.k}" for spec in SETTINGS]
    written = {path.name for path in (tmp_path / "kept").iterdir()}
    assert set(names) <= written, written
    dense = lego.create(DENSE)
    images = lego.open_images(SAMPLE, dense)
    before = lego.evaluate(dense, images.batches(250))
    assert f"top-1        {before.top1:.2f} %" in ran.out
    table = ran.out.partition("What it gained and lost")[2]
    rows = {
        line.split()[0]: re.split(r"\s{2,}", line.strip())
        for line in table.splitlines()
        if line.strip()
    }
    top1 = {}
    for name in names:
        folder = tmp_path / "kept" / name
        model = lego.load(folder)
        evaluation = lego.evaluate(model, images.batches(250), dense)
        totals = lego.measure(model, path=folder).totals()
        top1[name] = evaluation.top1
        cells = rows[name]
        stored = totals["stored_bytes"]
        assert cells == [
            name,
            f"{stored / 1e3:.2f} kB",
            f"{totals['dense_bits'] / stored / 8:.2f}x",
            f"{totals['macs'] / 1e6:.2f}M",
            f"{totals['theoretical_speedup']:.2f}x",
            f"{evaluation.top1:.1f} %",
            cells[6],
            f"{evaluation.agreement:.1f} %",
        ]
        summary = (
            f"{name}: top-1 {cells[6]} by clustering alone, {evaluation.top1:.1f} % calibrated, "
            f"of {before.top1:.1f} %"
        )
        assert summary in ran.out
        assert evaluation.top1 > float(cells[6].rstrip(" %")) + 40
    best = max(top1, key=lambda name: top1[name] or 0)
    assert f"reload {best} from its folder alone" in ran.out
    assert "dense export loads strictly; largest output difference 0.0e+00" in ran.out
