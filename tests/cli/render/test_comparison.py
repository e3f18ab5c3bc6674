"""The table of a comparison."""

from __future__ import annotations

import pytest
from legocompress_cli.render import print_comparison

from legocompress.report.compare import Comparison, ComparisonRow


def test_the_table_names_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    rows = (
        ComparisonRow("a", "lego", 1000, 2000, 1.5, 0.1, 1.0, 100.0, None),
        ComparisonRow("b.onnx", "onnx", 4000, None, 3.0, 0.02, 0.5, 91.25, None),
    )
    print_comparison(Comparison(rows, 1, 2, (1, 3, 8, 8), 7, 12, 0, ("b is slow",)))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == "network form bytes MACs ms spread speed agreement top-1"
    assert lines[3] == "a Lego, deployed 1.00 kB 2.00k 1.5 10 % 1.00x 100.0 %"
    assert lines[4] == "b.onnx ONNX Runtime 4.00 kB ? 3.0 2 % 0.50x 91.2 %"
    assert "against a" in lines[-3]
    assert "7 interleaved runs, 2 threads, input 1x3x8x8" in lines[-3]
    assert lines[-2:] == ["agreement on 12 images", "Note: b is slow"]
