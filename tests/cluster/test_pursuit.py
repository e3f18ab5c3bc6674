"""With several terms, each fragment is fitted by matching pursuit over the bank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from legocompress.cluster.clustering import cluster
from tests.support.clustering import FORMS, assemble, random_rows, relative_error


def run_textbook_omp(x: Tensor, bank: Tensor, n_terms: int) -> Tensor:
    """Fit each row by orthogonal matching pursuit, as in a textbook."""
    bank = torch.nn.functional.normalize(bank.double(), dim=1)
    fits = []
    for row in x.double():
        picked: list[int] = []
        residual = row
        for _ in range(n_terms):
            score = (bank @ residual).abs()
            score[picked] = -1
            picked.append(int(score.argmax()))
            atoms = bank[picked].T
            residual = row - atoms @ torch.linalg.lstsq(atoms, row[:, None]).solution[:, 0]
        fits.append(row - residual)
    return torch.stack(fits)


def test_more_terms_give_less_error() -> None:
    x = random_rows(300, 24)
    signed = [relative_error(x, cluster(x, 60, k)) for k in (1, 2, 3, 4, 6)]
    assert signed == sorted(signed, reverse=True)
    assert signed[-1] < 0.6 * signed[0]
    plain = [relative_error(x, cluster(x, 60, k, False)) for k in (1, 2, 4)]
    assert plain == sorted(plain, reverse=True)


@pytest.mark.parametrize("n_terms", [2, 4])
def test_pursuit_equals_that_of_the_textbook(n_terms: int) -> None:
    x = random_rows(80, 16).double()
    unit = cluster(x, 24, n_terms)
    expected = run_textbook_omp(x, unit.lego_filters, n_terms)
    torch.testing.assert_close(assemble(unit), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("n_terms", "coefficients"), FORMS)
def test_terms_of_a_slot_are_distinct(n_terms: int, coefficients: bool) -> None:
    index = cluster(random_rows(150, 8), 20, n_terms, coefficients).index
    assert index.dtype == torch.int64
    assert all(len(set(row)) == n_terms for row in index.tolist())


def test_sum_of_planted_pairs_is_found() -> None:
    # Each fragment is a sum of two out of 8 filters: one term cannot represent it, two terms can.
    bank = random_rows(8, 64, seed=1)
    first = torch.arange(224) % 8
    second = (first + 1 + torch.arange(224) % 7) % 8
    x = bank[first] * 2 - bank[second]
    assert relative_error(x, cluster(x, 12)) > 0.2
    assert relative_error(x, cluster(x, 12, 2)) < 0.05
