"""The plan of a conversion, as values."""

from __future__ import annotations

from dataclasses import dataclass, field

from legocompress.lego.costs import bank_bits, lego_macs, lego_params, unit_bits
from legocompress.lego.shape import UnitShape
from legocompress.spec import LegoSpec


@dataclass(frozen=True)
class LayerPlan:
    """What is to happen to one layer, and what it costs before and after.

    `reason` says why the layer stays dense. It is None where the layer is converted, and only then
    `shape` and `spec` are set. Bits are ideal bits. MACs are for one input of the probed size, and
    None where the layer did not run. `bank` is the name of the first layer that uses the same bank
    of Lego filters; the bank counts there, and not in the other layers.
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
    bank: str | None = None

    @property
    def converted(self) -> bool:
        """Whether the layer becomes a Lego module."""
        return self.reason is None

    @property
    def has_own_bank(self) -> bool:
        """Whether the bank counts here: no other layer uses it, or only later ones do."""
        return self.bank is None or self.bank == self.name

    @property
    def params(self) -> int:
        """Number of values after conversion: bank and coefficients, or the dense weight."""
        if self.shape is None or self.spec is None:
            return self.dense_params
        bank = 0 if self.has_own_bank else self.shape.n_filter_values
        return lego_params(self.shape, self.spec.coefficients) - bank

    @property
    def bits(self) -> int:
        """Ideal bits of the weight after conversion."""
        if self.shape is None or self.spec is None:
            return self.dense_bits
        bank = 0 if self.has_own_bank else bank_bits(self.shape, self.spec)
        return unit_bits(self.shape, self.spec) - bank

    @property
    def proxy_params(self) -> int:
        """Number of values of the proxy N while the index trains; 0 where there is no choice."""
        if self.shape is None or self.shape.n_lego == self.shape.n_terms:
            return 0
        return self.shape.n_fragments * self.shape.n_lego

    @property
    def macs(self) -> int | None:
        """MACs after conversion, by the cheaper route: split-transform-merge, or assembled."""
        if self.shape is None or self.dense_macs is None:
            return self.dense_macs
        assert self.pixels is not None
        return min(self.dense_macs, lego_macs(self.shape, self.pixels))


@dataclass(frozen=True)
class Plan:
    """Everything that a conversion will do; `convert_` carries it out.

    `rows` holds every conv and Linear of the model in execution order. `other_params` and
    `other_bits` count everything else (norms, biases, ...), so that all of them sum to the model.
    `reparameterize` says that the model has blocks in training form: the conversion fuses them
    first, and the names of the rows are names of the fused network.
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
        """Bits of the whole network before conversion."""
        return sum(row.dense_bits for row in self.rows) + self.other_bits

    @property
    def bits(self) -> int:
        """Ideal bits of the whole network after conversion."""
        return sum(row.bits for row in self.rows) + self.other_bits

    @property
    def dense_macs(self) -> int:
        """MACs before conversion, of the layers that ran."""
        return sum(row.dense_macs or 0 for row in self.rows)

    @property
    def macs(self) -> int:
        """MACs after conversion."""
        return sum(row.macs or 0 for row in self.rows)

    @property
    def proxy_bytes(self) -> int:
        """Bytes of all proxies N in float32 while indices train; optimiser states come on top."""
        return 4 * sum(row.proxy_params for row in self.rows)
