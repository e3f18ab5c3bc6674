"""What the tests of clustering share: random fragments, and the error of an approximation."""

from __future__ import annotations

import torch
from torch import Tensor

from legocompress.lego.unit import LegoUnit

# Number of terms, and whether they have coefficients.
FORMS = [(1, True), (1, False), (3, True), (3, False)]


def random_rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assemble(unit: LegoUnit) -> Tensor:
    terms = unit.lego_filters.double()[unit.index]
    if unit.coefficients is not None:
        terms = terms * unit.coefficients.double()[:, :, None]
    return terms.sum(1)


def relative_error(fragments: Tensor, unit: LegoUnit) -> float:
    """Relative error of the approximation, safe for values that overflow when squared."""
    scale = fragments.double().abs().max().clamp(min=1e-300)
    residual = (fragments.double() - assemble(unit)) / scale
    return float(residual.norm() / (fragments.double() / scale).norm().clamp(min=1e-300))
