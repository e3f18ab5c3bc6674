"""With one term, the clustering is at least as good as textbook k-means and gain-shape k-means."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from legocompress.cluster.clustering import cluster
from tests.support.clustering import assemble, random_rows, relative_error


def run_textbook_lloyd(x: Tensor, n_lego: int, signed: bool, seed: int) -> float:
    """Squared error of textbook k-means or gain-shape k-means, 50 rounds from a random start."""
    pick = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:n_lego]
    bank = x[pick].clone()
    for _ in range(50):
        if signed:
            bank = torch.nn.functional.normalize(bank, dim=1)
            gain, label = pick_by_size(x @ bank.T)
        else:
            label, gain = torch.cdist(x, bank).argmin(1), torch.ones(len(x), dtype=x.dtype)
        error = float((x - gain[:, None] * bank[label]).square().sum())
        for c in range(n_lego):
            members, weight = x[label == c], gain[label == c]
            if len(members):
                bank[c] = (weight[:, None] * members).sum(0) / weight.square().sum()
    return error


def pick_by_size(score: Tensor) -> tuple[Tensor, Tensor]:
    """Return the score of the largest absolute value in each row, and its column."""
    label = score.abs().argmax(1)
    return score.gather(1, label[:, None])[:, 0], label


@pytest.mark.slow
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_error_is_lower_than_that_of_the_textbook_from_five_starts(signed: bool, seed: int) -> None:
    x = random_rows(120, 10, seed=seed).double()
    best = min(run_textbook_lloyd(x, 30, signed, start) for start in range(5))
    unit = cluster(x, 30, coefficients=signed)
    assert relative_error(x, unit) ** 2 * float(x.square().sum()) < best


def test_a_case_small_enough_to_enumerate_is_solved_optimally() -> None:
    x = torch.tensor([[0.0], [1.0], [1.2], [5.0], [5.1], [9.0]])
    best = float("inf")
    for code in range(3**6):
        label = torch.tensor([code // 3**i % 3 for i in range(6)])
        parts = [x[label == c] for c in range(3)]
        best = min(best, sum(float((p - p.mean(0)).square().sum()) for p in parts if len(p)))
    unit = cluster(x, 3, coefficients=False)
    assert float((x - assemble(unit)).square().sum()) == pytest.approx(best, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("n_fragments", [300, 4100])
def test_every_fragment_has_its_nearest_filter(n_fragments: int) -> None:
    x = random_rows(n_fragments, 9).double()
    unit = cluster(x, 130, coefficients=False)
    distance = torch.cdist(x, unit.lego_filters)
    chosen = distance.gather(1, unit.index)[:, 0]
    torch.testing.assert_close(chosen, distance.amin(1), rtol=1e-9, atol=1e-9)
    n_uses = torch.bincount(unit.index[:, 0], minlength=130)
    assert int(n_uses.min()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("n_fragments", [300, 4100])
def test_every_fragment_has_its_best_filter_and_gain(n_fragments: int) -> None:
    x = random_rows(n_fragments, 9).double()
    unit = cluster(x, 130)
    assert unit.coefficients is not None
    direction = torch.nn.functional.normalize(unit.lego_filters, dim=1)
    cosine = (x @ direction.T).abs()
    chosen = cosine.gather(1, unit.index)[:, 0]
    torch.testing.assert_close(chosen, cosine.amax(1), rtol=1e-9, atol=1e-9)
    picked = unit.lego_filters[unit.index[:, 0]]
    gain = (x * picked).sum(1) / picked.square().sum(1)
    torch.testing.assert_close(unit.coefficients[:, 0], gain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("coefficients", [True, False])
def test_planted_bank_is_found(coefficients: bool) -> None:
    bank = torch.nn.functional.normalize(random_rows(32, 48, seed=1), dim=1)
    label = torch.arange(160) % 32
    gain = random_rows(160, seed=2).sign() * (1 + random_rows(160, seed=3).abs())
    x = bank[label] * (gain[:, None] if coefficients else 1) + 1e-4 * random_rows(160, 48, seed=4)
    unit = cluster(x, 32, coefficients=coefficients)
    assert relative_error(x, unit) < 1e-3
    assert len(torch.unique(torch.stack([label, unit.index[:, 0]]), dim=1)[0]) == 32


@pytest.mark.slow
def test_no_worse_than_scikit_learn() -> None:
    sklearn_cluster = pytest.importorskip("sklearn.cluster")
    x = random_rows(600, 40) * torch.linspace(0.2, 2, 600)[:, None]
    for n_lego in (40, 150):
        rival = sklearn_cluster.KMeans(n_lego, n_init=1, random_state=0).fit(x.numpy())
        unit = cluster(x, n_lego, coefficients=False)
        assert float((x - assemble(unit)).square().sum()) < 1.01 * rival.inertia_
