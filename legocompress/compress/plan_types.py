"""The plan of a conversion, as values."""

from __future__ import annotations

from dataclasses import dataclass, field

from legocompress.lego.costs import lego_macs, lego_params, unit_bits
from legocompress.lego.shape import UnitShape
from legocompress.spec import LegoSpec


@dataclass(frozen=True)
class LayerPlan:
    """What is to happen to one layer, and what it costs before and after.

    `reason` says why the layer stays dense; it is None where the layer is converted, and only then
    are `shape` and `spec` there. Bits are ideal ones; macs are for one input of the probed size and
    None where the layer did not run.
    """

    name: str
    type_name: str
    weight_shape: tuple[int, ...]
    groups: int
    reason: str | None
    dense_params: int
    dense_bits: int
    dense_macs: int | None
    shape: UnitShape | None = None
    spec: LegoSpec | None = None
    pixels: int | None = None

    @property
    def converted(self) -> bool:
        """Whether the layer becomes a Lego module."""
        return self.reason is None

    @property
    def params(self) -> int:
        """Numbers in the layer's weight afterwards: bank and coefficients, or the dense weight."""
        if self.shape is None or self.spec is None:
            return self.dense_params
        return lego_params(self.shape, self.spec.coefficients)

    @property
    def bits(self) -> int:
        """Ideal bits of the layer's weight afterwards."""
        if self.shape is None or self.spec is None:
            return self.dense_bits
        return unit_bits(self.shape, self.spec)

    @property
    def proxy_params(self) -> int:
        """Numbers of the proxy N while the index trains; 0 where there is nothing to choose."""
        if self.shape is None or self.shape.n_lego == self.shape.n_terms:
            return 0
        return self.shape.n_fragments * self.shape.n_lego

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates afterwards, by the cheaper form: merge, or dense once assembled."""
        if self.shape is None or self.dense_macs is None:
            return self.dense_macs
        assert self.pixels is not None
        return min(self.dense_macs, lego_macs(self.shape, self.pixels))


@dataclass(frozen=True)
class Plan:
    """Everything that a conversion will do; `convert_` carries it out.

    `rows` holds every conv and Linear of the model in execution order. `other_params` and
    `other_bits` are those of all that stands in no row (norms, biases, ...), so that the rows and
    the rest sum to the model. `reparameterize` tells that the model has blocks in training form,
    which conversion first turns into their deployed form; the names are those of the deployed one.
    """

    spec: LegoSpec
    rows: tuple[LayerPlan, ...]
    other_params: int
    other_bits: int
    reparameterize: bool = False
    input_shape: tuple[int, ...] | None = None
    note: str | None = None
    layers: dict[str, LayerPlan] = field(init=False, repr=False)
    skipped: dict[str, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", {r.name: r for r in self.rows if r.converted})
        skipped = {r.name: r.reason for r in self.rows if r.reason is not None}
        object.__setattr__(self, "skipped", skipped)

    @property
    def dense_bits(self) -> int:
        """Bits of the whole network before."""
        return sum(row.dense_bits for row in self.rows) + self.other_bits

    @property
    def bits(self) -> int:
        """Ideal bits of the whole network afterwards."""
        return sum(row.bits for row in self.rows) + self.other_bits

    @property
    def dense_macs(self) -> int:
        """Multiply-accumulates before, of the layers that ran."""
        return sum(row.dense_macs or 0 for row in self.rows)

    @property
    def macs(self) -> int:
        """Multiply-accumulates afterwards."""
        return sum(row.macs or 0 for row in self.rows)

    @property
    def proxy_bytes(self) -> int:
        """Memory of all proxies N in float32 while indices train; an optimiser may keep as much."""
        return 4 * sum(row.proxy_params for row in self.rows)
