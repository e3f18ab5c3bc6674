"""The closed form of a layer's error, against plain sums."""

from __future__ import annotations

import pytest
import torch

from legocompress.calibrate.moments import Moments


@pytest.mark.parametrize("groups", [1, 3])
def test_the_error_is_that_of_plain_sums(groups: int) -> None:
    x, weight = torch.randn(50, groups, 8), torch.randn(groups, 5, 8)
    y = torch.randn(50, groups, 5)
    moments = Moments(groups, 8, 5 * groups, 1, x.device)
    for part in torch.split(torch.arange(50), 20):
        moments.add(x[part], y[part])
    moments.finish(weight)
    missed = y - torch.einsum("pgd,gnd->pgn", x, weight)
    wanted = float(missed.square().sum() / y.square().sum())
    assert moments.error(weight) == pytest.approx(wanted, rel=1e-4)
    assert moments.samples == 50


def test_the_solution_is_that_of_least_squares() -> None:
    x, y = torch.randn(200, 1, 6), torch.randn(200, 1, 4)
    moments = Moments(1, 6, 4, 1, x.device)
    moments.add(x, y)
    moments.finish(torch.zeros(1, 4, 6))
    wanted = torch.linalg.lstsq(x[:, 0], y[:, 0]).solution.T
    assert torch.allclose(moments.solve()[0], wanted, atol=1e-4)


def test_blocks_neglect_only_what_goes_across_them() -> None:
    x = torch.randn(40, 1, 8)
    x[:20, :, 4:] = 0
    x[20:, :, :4] = 0  # nothing goes across
    weight, other = torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    errors = []
    for parts in (1, 2):
        moments = Moments(1, 8, 3, parts, x.device)
        moments.add(x, torch.einsum("pgd,gnd->pgn", x, weight))
        moments.finish(weight)
        errors.append(moments.error(other))
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


def test_damping_keeps_the_original_where_nothing_was_seen() -> None:
    x = torch.zeros(30, 1, 4)
    x[:, :, 0] = torch.randn(30, 1)
    original = torch.randn(1, 2, 4)
    moments = Moments(1, 4, 2, 1, x.device)
    moments.add(x, 2 * torch.einsum("pgd,gnd->pgn", x, original))
    moments.finish(original, damping=1e-3)
    solved = moments.solve()
    assert torch.allclose(solved[..., 1:], original[..., 1:], atol=1e-4)
    assert torch.allclose(solved[..., :1], 2 * original[..., :1], rtol=0.02)
