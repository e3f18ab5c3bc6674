"""The numbers of the page's first screen, and the reasons why layers stay dense."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from legocompress.report.html.charts import shorten
from legocompress.report.html.photos import Comparison
from legocompress.report.results import Latency, Report
from legocompress.state.calibration import Calibration

MAX_NAMES = 30  # of the layers that stay dense for one reason


@dataclass(frozen=True)
class Agreement:
    """How often the network has the same first class as its original, and on what images."""

    percent: float
    images: str


@dataclass(frozen=True)
class Summary:
    """What the first screen tells.

    `fastest` is the fastest measured form of the compressed network, None where nothing was timed
    against the dense one.
    """

    n_converted: int
    n_layers: int
    size_ratio: float | None
    macs_ratio: float | None
    fastest: Latency | None
    agreement: Agreement | None


@dataclass(frozen=True)
class Reason:
    """Why some layers are not converted; `n_more` of their names are left out."""

    text: str
    names: tuple[str, ...]
    n_more: int

    @property
    def n_layers(self) -> int:
        """How many layers it holds for."""
        return len(self.names) + self.n_more


def summarise(
    report: Report,
    calibration: Calibration | None,
    comparison: Comparison | None,
    photos_calibrated: bool,
) -> Summary:
    """Choose the numbers of the first screen.

    Agreement on photos that calibration has used is only a fallback for that on its hold-out set.
    """
    rows = [row for row in report.rows if row.weight_shape]
    bytes_now = report.stored_bytes or report.total("bits") / 8
    timed = [one for one in report.latency if one.form != "dense"]
    has_dense = len(timed) < len(report.latency)
    return Summary(
        n_converted=sum(row.n_lego is not None for row in rows),
        n_layers=len(rows),
        size_ratio=report.total("dense_bits") / 8 / bytes_now if bytes_now else None,
        macs_ratio=report.speedup,
        fastest=max(timed, key=lambda one: one.ratio) if timed and has_dense else None,
        agreement=_find_agreement(calibration, comparison, photos_calibrated),
    )


def _find_agreement(
    calibration: Calibration | None, comparison: Comparison | None, photos_calibrated: bool
) -> Agreement | None:
    held_out = None
    if calibration is not None and calibration.agreement_after is not None:
        kind = "synthetic images" if calibration.synthetic else "photos"
        held_out = Agreement(
            calibration.agreement_after, f"{kind} that calibration held out (a little optimistic)"
        )
    if comparison is None or (photos_calibrated and held_out is not None):
        return held_out
    used = " that calibration has used" if photos_calibrated else ""
    return Agreement(comparison.agreement, f"{comparison.n_photos} photos{used}")


def group_reasons(report: Report) -> list[Reason]:
    """Group the layers that stay dense by reason, the most frequent one first."""
    names = defaultdict(list)
    for row in report.rows:
        if row.weight_shape and row.reason is not None:
            names[row.reason].append(shorten(row.name or "(root)"))
    groups = sorted(names.items(), key=lambda item: -len(item[1]))
    return [
        Reason(shorten(text, 500), tuple(layers[:MAX_NAMES]), max(0, len(layers) - MAX_NAMES))
        for text, layers in groups
    ]
