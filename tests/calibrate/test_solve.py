"""Fitting one unit: no step raises the error, and the bank is that of least squares."""

from __future__ import annotations

import itertools

import pytest
import torch

from legocompress.calibrate.moments import Moments
from legocompress.calibrate.solve import (
    fit_unit,
    improve_bank,
    improve_slots,
    padded_filters,
)
from legocompress.lego.shape import UnitShape
from legocompress.lego.unit import LegoUnit


def problem(
    groups: int, n_terms: int, signed: bool, parts: int = 1
) -> tuple[UnitShape, LegoUnit, Moments, Moments]:
    generator = torch.Generator().manual_seed(3)
    n, o, d, m = 12 * groups, 2, 6, 8
    mix = torch.randn(groups, o * d, o * d, generator=generator)
    weight = torch.randn(groups, n // groups, o * d, generator=generator)
    both: list[Moments] = []
    for _ in range(2):
        x = torch.einsum("pgd,gde->pge", torch.randn(300, groups, o * d, generator=generator), mix)
        moments = Moments(groups, o * d, n, parts, x.device)
        moments.add(x, torch.einsum("pgd,gnd->pgn", x, weight))
        moments.finish(weight, 1e-3 if not both else 0.0)
        both.append(moments)
    shape = UnitShape(n, o * d, (1, 1), groups, m, o, n_terms)
    index = torch.stack(
        [torch.randperm(m, generator=generator)[:n_terms] for _ in range(o * n)]
    ).reshape(o, n, n_terms)
    gains = torch.randn(index.shape, generator=generator) if signed else None
    unit = LegoUnit(torch.randn(m, d, generator=generator), index, gains)
    return shape, unit, both[0], both[1]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("n_terms", [1, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_no_step_raises_the_error(groups: int, n_terms: int, signed: bool, parts: int) -> None:
    shape, unit, seen, _ = problem(groups, n_terms, signed, parts)
    errors = [seen.error(padded_filters(shape, unit))]
    for step in (improve_slots, improve_bank, improve_slots, improve_bank):
        unit = step(shape, unit, seen)
        errors.append(seen.error(padded_filters(shape, unit)))
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.9 * errors[0]
    picks = unit.index.sort(-1).values
    assert bool((picks[..., 1:] > picks[..., :-1]).all())  # distinct in a slot


def test_the_bank_is_that_of_least_squares() -> None:
    shape, unit, seen, _ = problem(1, 1, True)
    for _ in range(20):
        unit = improve_bank(shape, unit, seen)
    m, d = unit.lego_filters.shape
    columns = []
    for number in range(m * d):
        basis = torch.zeros(m * d)
        basis[number] = 1
        columns.append(padded_filters(shape, unit, basis.reshape(m, d)).flatten())
    design = torch.stack(columns, 1).double()
    square = torch.kron(torch.eye(12), seen.square[0, 0]).double()
    normal = design.T @ square @ design
    right = design.T @ seen.cross.double().flatten()
    best = torch.linalg.lstsq(normal, right, driver="gelsd").solution
    filters = padded_filters(shape, unit, best.reshape(m, d).float())
    assert seen.error(padded_filters(shape, unit)) == pytest.approx(seen.error(filters), abs=1e-4)


def test_a_fit_is_never_worse_on_held_out_samples() -> None:
    for n_terms in (1, 2):
        shape, unit, seen, held_out = problem(1, n_terms, True)
        fitted = fit_unit(shape, unit, seen, held_out, 0)
        assert held_out.error(padded_filters(shape, fitted)) < held_out.error(
            padded_filters(shape, unit)
        )
        again = fit_unit(shape, fitted, seen, held_out, 0)
        assert held_out.error(padded_filters(shape, again)) <= held_out.error(
            padded_filters(shape, fitted)
        )
