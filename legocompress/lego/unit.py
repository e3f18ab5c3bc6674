"""The tensors of one Lego unit: filters, index and coefficients."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LegoUnit(NamedTuple):
    """What a Lego unit consists of; its `UnitShape` says how the three belong together.

    For a layer, `lego_filters` is (m, q, kh, kw), `index` (o, n, k) integers in [0, m), and
    `coefficients` (o, n, k), or None in the binary form, where all of them are one. Clustering,
    which knows rows and not layers, uses the same type with filters (m, d), and with an index and
    coefficients (N, k) for N fragments.
    """

    lego_filters: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    coefficients: Tensor | None
