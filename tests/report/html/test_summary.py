"""The numbers of the first screen, and the reasons."""

from __future__ import annotations

from dataclasses import replace

import pytest

from legocompress.report.html.photos import Comparison
from legocompress.report.html.summary import MAX_NAMES, Agreement, group_reasons, summarise
from legocompress.report.results import Latency
from legocompress.state.calibration import Calibration
from tests.support.pages import make_pair

RECORD = Calibration(
    images=40, sha256="0", synthetic=False, seed=0, epochs=0, norms=False, error_before=1.0,
    error_after=0.5, agreement_before=10.0, agreement_after=80.0, layers=[],
)  # fmt: skip
HELD_OUT = Agreement(80.0, "photos that calibration held out (a little optimistic)")


@pytest.mark.parametrize(
    ("record", "compared", "used", "expected"),
    [
        (None, False, False, None),
        (RECORD, False, False, HELD_OUT),
        (RECORD, True, False, Agreement(60.0, "30 photos")),
        (RECORD, True, True, HELD_OUT),
        (None, True, True, Agreement(60.0, "30 photos that calibration has used")),
    ],
)
def test_photos_that_calibration_has_used_count_last(
    record: Calibration | None, compared: bool, used: bool, expected: Agreement | None
) -> None:
    _, _, report = make_pair()
    comparison = Comparison(30, 60.0, ()) if compared else None
    summary = summarise(report, record, comparison, used)
    assert summary.agreement == expected
    assert (summary.n_converted, summary.n_layers) == (2, 4)
    assert summary.fastest is None


def test_the_fastest_form_counts_if_dense_was_timed() -> None:
    _, _, report = make_pair()
    forms = [
        Latency(form, 10.0 / ratio, (1.0, 2.0), ratio, "cpu", 1, 1, "float32", 3)
        for form, ratio in (("dense", 1.0), ("assembled", 0.9), ("reference", 1.2))
    ]
    assert summarise(replace(report, latency=tuple(forms)), None, None, False).fastest == forms[2]
    assert summarise(replace(report, latency=tuple(forms[1:])), None, None, False).fastest is None


def test_reasons_are_grouped_and_long_lists_cut() -> None:
    _, _, report = make_pair()
    dense = next(row for row in report.rows if row.weight_shape and row.n_lego is None)
    many = [replace(dense, name=f"n{number}", reason="depthwise") for number in range(40)]
    first, second = group_reasons(replace(report, rows=(replace(dense, reason="stem"), *many)))
    assert (first.text, first.n_layers, len(first.names)) == ("depthwise", 40, MAX_NAMES)
    assert (second.text, second.names, second.n_more) == ("stem", (dense.name,), 0)
