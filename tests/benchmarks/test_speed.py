"""The script of the speed table: its other merges compute the same, and its table is complete."""

from __future__ import annotations

import pytest
import torch

import legocompress as lego
from benchmarks.common import merges, speed_tables
from legocompress.report.rivals import torch_forms
from tests.support.benchmarking import IMAGE, network


def test_other_merges_compute_the_same() -> None:
    model = network().eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        forms = dict(merges.list_merges(model, x))
        assert len(forms) == 3
        for run in forms.values():
            torch.testing.assert_close(run(), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_table_of_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_forms, "COMPILE_SECONDS", 0)
    run = lego.benchmark(
        network(), 1, 1, ("dense",), 2, 60, IMAGE, also=merges.list_merges
    ).to_dict()
    key = dict(zip(speed_tables.KEY, ("resnet50", "m0.5-o2", 1, 1), strict=True))
    lines = speed_tables.format_speeds([{**key, "run": run}]).splitlines()
    assert len(lines) == 3
    assert len({line.count("|") for line in lines}) == 1
    assert f"**{run['ratio']:.2f}**" in lines[2]
    assert "resnet50 | m0.5-o2 | 1 | 1" in lines[2]
