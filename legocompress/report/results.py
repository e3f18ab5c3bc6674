"""The results of a measurement, as values."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One layer (or, named '(other)', all that is no layer): what it was and what it is.

    Bits are ideal ones. `macs` is by the cheaper of the merge and the dense form, and
    `macs_used_only` by a merge that skips the Lego filters that a split never names.
    `fewer_filters` is m' <= n and `fewer_bits` is |G| + |B| <= |F|; both None where dense.
    """

    name: str
    type_name: str
    weight_shape: tuple[int, ...]
    n_lego: int | None
    n_split: int | None
    n_terms: int | None
    dense_params: int
    params: int
    dense_bits: int
    bits: int
    dense_macs: int | None
    macs: int | None
    macs_used_only: int | None
    fewer_filters: bool | None
    fewer_bits: bool | None
    weight_error: float | None
    reason: str | None


@dataclass(frozen=True)
class Latency:
    """Median and quartiles of interleaved runs of one form, with the conditions they hold under."""

    form: str
    median_ms: float
    quartiles_ms: tuple[float, float]
    ratio: float
    device: str
    threads: int
    batch: int
    dtype: str
    repeats: int


@dataclass(frozen=True)
class Report:
    """What a converted network is, layer by layer; the rows sum to the totals."""

    rows: tuple[LayerReport, ...]
    stored_bytes: int | None
    fvcore_macs: int | None
    input_shape: tuple[int, ...] | None
    note: str | None
    latency: tuple[Latency, ...] = ()

    def total(self, column: str) -> int:
        """Sum of a column over all rows; layers that did not run count as nothing."""
        return sum(getattr(row, column) or 0 for row in self.rows)

    @property
    def speedup(self) -> float | None:
        """Theoretical speedup of the whole network: dense over Lego multiply-accumulates."""
        macs = self.total("macs")
        return self.total("dense_macs") / macs if macs else None

    @property
    def weight_error(self) -> float | None:
        """Relative error ||F - F'|| / ||F|| over all converted layers, each weighing the same."""
        errors = [row.weight_error for row in self.rows if row.weight_error is not None]
        return statistics.fmean(e**2 for e in errors) ** 0.5 if errors else None

    def totals(self) -> dict[str, Any]:
        """The whole network's numbers, as the command line prints them."""
        columns = [
            "dense_params",
            "params",
            "dense_bits",
            "bits",
            "dense_macs",
            "macs",
            "macs_used_only",
        ]
        return {
            **{column: self.total(column) for column in columns},
            "stored_bytes": self.stored_bytes,
            "theoretical_speedup": self.speedup,
            "relative_weight_error": self.weight_error,
            "fvcore_macs": self.fvcore_macs,
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {**asdict(self), "totals": self.totals()}
