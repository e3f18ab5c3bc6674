"""Clusterings are exact copies where possible, reproducible, and safe on degenerate inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from legocompress.cluster.clustering import cluster, clusterings
from tests.support.clustering import FORMS, assemble, random_rows, relative_error

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("n_terms", "coefficients"), FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_fewer_fragments_than_filters_are_copied_bit_for_bit(
    n_terms: int, coefficients: bool, dtype: torch.dtype
) -> None:
    x = random_rows(7, 5, dtype=dtype) * 1e-3
    unit = cluster(x, 10, n_terms, coefficients)
    assert torch.equal(unit.lego_filters, torch.cat([x, x.new_zeros(3, 5)]))
    assert torch.equal(unit.index[:, 0], torch.arange(7))
    if unit.coefficients is None:
        assert torch.equal(assemble(unit), x.double())
        assert bool((unit.index[:, 1:] >= 7).all())
    else:
        assert torch.equal(unit.coefficients, torch.eye(n_terms, dtype=dtype)[:1].expand(7, -1))
    assert all(len(set(row)) == n_terms for row in unit.index.tolist())


def test_as_many_fragments_as_filters_are_copied() -> None:
    x = random_rows(6, 4)
    unit = cluster(x, 6, coefficients=False)
    assert torch.equal(unit.lego_filters, x)
    assert unit.coefficients is None
    with pytest.raises(ValueError, match="n_terms must be 1"):
        cluster(x, 6, n_terms=2, coefficients=False)


@pytest.mark.parametrize(("n_terms", "coefficients"), FORMS)
def test_fewer_distinct_fragments_than_filters_are_copied(n_terms: int, coefficients: bool) -> None:
    x = random_rows(10, 8).repeat(30, 1)
    assert relative_error(x, cluster(x, 20, n_terms, coefficients)) == 0
    if coefficients or n_terms == 1:
        assert relative_error(x, cluster(x, 10, n_terms, coefficients)) == 0


@pytest.mark.parametrize(("n_terms", "coefficients"), FORMS)
def test_same_seed_gives_same_bytes_and_leaves_the_global_state(
    n_terms: int, coefficients: bool
) -> None:
    x = random_rows(200, 12)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = cluster(x, 40, n_terms, coefficients, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again = cluster(x, 40, n_terms, coefficients, seed=3)
    for one, other in zip(first, again, strict=True):
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("coefficients", [True, False])
def test_several_numbers_of_terms_at_once_equal_those_one_by_one(coefficients: bool) -> None:
    x = random_rows(150, 12)
    x[:10] = x[0]
    for n_lego in (30, 141, 145):  # 141 rows are distinct
        terms = [4, 1, 2]
        units = clusterings(x, n_lego, terms, coefficients, 3)
        for n_terms, unit in zip(terms, units, strict=True):
            expected = cluster(x, n_lego, n_terms, coefficients, 3)
            for one, other in zip(unit, expected, strict=True):
                assert one is other is None or torch.equal(one, other)


@pytest.mark.slow
def test_another_seed_gives_another_bank() -> None:
    # The seed decides how fragments are dealt into blocks, so it needs several blocks to show.
    x = random_rows(4100, 4)
    first, other = (cluster(x, 128, seed=seed) for seed in (0, 1))
    assert not torch.equal(first.lego_filters, other.lego_filters)


def test_fragments_stay_unchanged_and_no_graph_is_built() -> None:
    x = random_rows(64, 6).requires_grad_()
    copy = x.detach().clone()
    unit = cluster(x, 16)
    assert torch.equal(x, copy)
    assert not unit.lego_filters.requires_grad


@pytest.mark.parametrize("n_terms", [1, 3])
def test_coefficients_have_rms_one(n_terms: int) -> None:
    unit = cluster(random_rows(300, 12) * 1e-4, 60, n_terms)
    assert unit.coefficients is not None
    for c in range(60):
        gains = unit.coefficients[unit.index == c]
        assert len(gains) == 0 or float(gains.square().mean()) == pytest.approx(1, rel=1e-4)


DEGENERATE = {
    "one row": random_rows(1, 5),
    "all zero": torch.zeros(40, 6),
    "constant": torch.full((40, 6), 3.0),
    "one dimension": random_rows(300, 1),
    "parallel": random_rows(60, 1) * random_rows(1, 6),
    "duplicates": random_rows(9, 6).repeat(20, 1),
    "almost duplicates": random_rows(5, 8).repeat(40, 1) + 1e-7 * random_rows(200, 8, seed=1),
    "dead filters": torch.cat([random_rows(50, 6), torch.zeros(90, 6), 1e-20 * random_rows(60, 6)]),
    "opposite": torch.cat([torch.ones(40, 3), -torch.ones(40, 3), torch.zeros(20, 3)]),
    "orthogonal": torch.eye(40),
    "tiny": random_rows(80, 6) * 1e-20,
    "denormal": random_rows(80, 6) * 1e-42,
    "huge": random_rows(80, 6) * 1e15,
    "almost overflow": random_rows(80, 6) * 1e37,
    "twelve orders": random_rows(200, 6) * 10 ** (3 * random_rows(200, 1, seed=1)),
    "half, large": (random_rows(80, 6) * 1.5e4).half(),
    "half, small": (random_rows(80, 6) * 1e-6).half(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize(("n_terms", "coefficients"), FORMS)
def test_degenerate_inputs(name: str, n_terms: int, coefficients: bool) -> None:
    x = DEGENERATE[name]
    for n_lego in sorted({n_terms, 10, len(x) // 2, len(x) - 1, len(x) + 3}):
        if n_lego < n_terms or (n_lego == len(x) and n_terms > 1 and not coefficients):
            continue
        unit = cluster(x, n_lego, n_terms, coefficients)
        assert unit.lego_filters.shape == (n_lego, x.shape[1])
        assert unit.lego_filters.dtype == x.dtype
        assert bool(unit.lego_filters.isfinite().all())
        assert unit.index.shape == (len(x), n_terms)
        assert 0 <= int(unit.index.min()) <= int(unit.index.max()) < n_lego
        if unit.coefficients is not None:
            assert unit.coefficients.dtype == x.dtype
            assert bool(unit.coefficients.isfinite().all())
        assert relative_error(x, unit) <= 1.001  # never worse than zeros


@pytest.mark.parametrize("name", ["one dimension", "parallel", "all zero", "constant"])
def test_rank_one_needs_one_filter(name: str) -> None:
    assert relative_error(DEGENERATE[name], cluster(DEGENERATE[name], 1)) < 1e-6


@pytest.mark.parametrize("scale", [1e-20, 1e15])
@pytest.mark.parametrize(("n_terms", "coefficients"), FORMS)
def test_error_does_not_depend_on_scale(scale: float, n_terms: int, coefficients: bool) -> None:
    x = random_rows(120, 8)
    one, other = (relative_error(y, cluster(y, 30, n_terms, coefficients)) for y in (x, x * scale))
    assert one == pytest.approx(other, rel=0.02)


def test_zero_fragments_cost_no_more_than_one_lego_filter() -> None:
    x = torch.cat([random_rows(40, 6), torch.zeros(300, 6)])
    assert relative_error(x, cluster(x, 41, coefficients=False)) == 0
    weak = torch.cat([random_rows(40, 6), 1e-12 * random_rows(300, 6, seed=1)])
    assert relative_error(weak, cluster(weak, 41, coefficients=False)) < 1e-6


@pytest.mark.parametrize(("n_terms", "coefficients"), FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(
    n_terms: int, coefficients: bool, dtype: torch.dtype
) -> None:
    x = random_rows(120, 8, dtype=dtype)
    unit = cluster(x, 30, n_terms, coefficients)
    full = cluster(x.float(), 30, n_terms, coefficients)
    assert torch.equal(unit.index, full.index)
    assert torch.equal(unit.lego_filters, full.lego_filters.to(dtype))


def test_an_offset_far_from_zero_keeps_the_detail() -> None:
    x = random_rows(200, 8) * 1e-3
    near, far = (cluster(y, 50, coefficients=False) for y in (x, x + 5))
    errors = [float((y.double() - assemble(f)).norm()) for y, f in ((x, near), (x + 5, far))]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


@pytest.mark.parametrize(
    ("fragments", "n_lego", "n_terms", "message"),
    [
        (torch.ones(4), 2, 1, "non-empty"),
        (torch.ones(0, 3), 2, 1, "non-empty"),
        (torch.ones(4, 3, dtype=torch.int64), 2, 1, "floating"),
        (torch.tensor([[1.0], [float("nan")]]), 1, 1, "finite"),
        (torch.ones(4, 3), 0, 1, "n_lego = 0"),
        (torch.ones(4, 3), 2, 0, "n_terms"),
        (torch.ones(4, 3), 2, 3, "between 1 and n_lego = 2"),
    ],
)
def test_bad_arguments_are_refused(
    fragments: Tensor, n_lego: int, n_terms: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cluster(fragments, n_lego, n_terms)
