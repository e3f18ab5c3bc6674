"""The values that a measurement returns."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """Sizes and costs of one layer, before (`dense_*`) and after conversion.

    The row named '(other)' sums all parameters outside of such layers: norms and biases. Bits are
    ideal: each index takes ceil(log2 m') bits. Costs are None for a layer that did not run.

        macs            MACs of the Lego form or of the dense form, whichever has fewer
        macs_used_only  the same, if the Lego form skips Lego filters that a split never uses
        fewer_filters   m' <= n: no more Lego filters than output channels; None if dense
        fewer_bits      |G| + |B| <= |F|: no more bits than the dense weight; None if dense
        weight_error    ||F - F'|| / ||F|| of the converted weight F'; None if dense or unknown
        reason          why the layer is not converted; None if it is
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
    """Median and quartiles of one form's interleaved runs, and the conditions of the measurement.

    `ratio` is the time of the first form over the time of this one: above 1 is faster.
    """

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
    """The measurement of a network, one row per layer; the rows sum to the totals.

    `stored_bytes` are those of the folder on disk, `fvcore_macs` is fvcore's count of the MACs,
    `note` tells why the network could not be run. Each is None if there is nothing to tell.
    """

    rows: tuple[LayerReport, ...]
    stored_bytes: int | None
    fvcore_macs: int | None
    input_shape: tuple[int, ...] | None
    note: str | None
    latency: tuple[Latency, ...] = ()

    def total(self, column: str) -> int:
        """Sum a column over all rows; None counts as 0 (the MACs of a layer that did not run)."""
        return sum(getattr(row, column) or 0 for row in self.rows)

    @property
    def speedup(self) -> float | None:
        """Theoretical speedup of the whole network: dense MACs / MACs now; None without MACs."""
        macs = self.total("macs")
        return self.total("dense_macs") / macs if macs else None

    @property
    def weight_error(self) -> float | None:
        """Root mean square of the converted layers' weight errors; None if there are none."""
        errors = [row.weight_error for row in self.rows if row.weight_error is not None]
        return statistics.fmean(e**2 for e in errors) ** 0.5 if errors else None

    def totals(self) -> dict[str, Any]:
        """The numbers of the whole network, as the command line prints them."""
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
        """All fields and the totals, as plain JSON values."""
        return {**asdict(self), "totals": self.totals()}
