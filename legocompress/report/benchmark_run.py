"""The values that a benchmark returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from legocompress.report.rivals.form import Precision

LEGO = "lego"  # the name of the compressed network among the forms


@dataclass(frozen=True)
class FormTime:
    """The times of one form.

    precision   what it computes in
    ratio       median time of the fastest dense form in fp32 / median time of this form;
                above 1 this form is faster
    spread      (upper quartile - lower quartile) / median
    peak_bytes  by how much one run raises the memory of the process; None if unknown
    agreement   percent of the held-out photos that get the first class of the original network
    top1        percent of the labelled images that get their class; both are None if not measured
    """

    form: str
    precision: Precision
    median_ms: float
    quartiles_ms: tuple[float, float]
    ratio: float
    spread: float
    peak_bytes: int | None
    agreement: float | None = None
    top1: float | None = None


@dataclass(frozen=True)
class JudgedBy:
    """What the accuracies were measured on: numbers of images, and the original's own top-1."""

    calibration: int
    held_out: int
    labelled: int
    original_top1: float | None


@dataclass(frozen=True)
class LayerTime:
    """The times of one deployed Lego layer on its route and in its fastest dense form.

    ratio       dense_ms / ms
    bound       the ratio in theory: dense MACs / Lego MACs
    bound_used  the same, if Lego filters that a split does not use are skipped
    """

    name: str
    route: str
    ms: float
    dense_ms: float
    ratio: float
    bound: float
    bound_used: float


@dataclass(frozen=True)
class BenchmarkRun:
    """The times of all forms at one batch size and number of threads.

    `rounds` is how often each form was timed, and `clock` what they were timed with.
    `fastest_fp32` names the fastest dense form in fp32, and is `lego` if none was timed. `bound`
    and `bound_used` are as in `LayerTime`, but for the whole network. `left_out` gives the reason
    for each form that could not run. `judged_by` is None if no accuracy was measured.
    """

    batch: int
    threads: int
    input_shape: tuple[int, ...]
    dtype: str
    processor: str
    instructions: str
    clock: str
    rounds: int
    fastest_fp32: str
    bound: float
    bound_used: float
    forms: tuple[FormTime, ...]
    left_out: dict[str, str]
    layers: tuple[LayerTime, ...]
    notes: tuple[str, ...]
    judged_by: JudgedBy | None = None

    @property
    def ratio(self) -> float:
        """How many times as fast the network is as the fastest dense form in fp32."""
        return next(form.ratio for form in self.forms if form.form == LEGO)

    @property
    def fastest_reduced(self) -> FormTime | None:
        """The fastest dense form in bf16 or int8; None if none was timed."""
        reduced = [form for form in self.forms if form.precision != "fp32"]
        return max(reduced, key=lambda form: form.ratio, default=None)

    def to_dict(self) -> dict[str, Any]:
        """All fields and the ratio, as plain JSON values."""
        return {**asdict(self), "ratio": self.ratio}
