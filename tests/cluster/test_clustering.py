import pytest
import torch
from torch import Tensor

from legocompress.cluster.clustering import cluster, clusterings
from legocompress.lego.unit import LegoUnit

FORMS = [(1, True), (1, False), (3, True), (3, False)]


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assemble(factors: LegoUnit) -> Tensor:
    slots = factors.lego_filters.double()[factors.index]
    if factors.coefficients is not None:
        slots = slots * factors.coefficients.double()[:, :, None]
    return slots.sum(1)


def error(fragments: Tensor, factors: LegoUnit) -> float:
    """Relative weight error, safe for values that overflow when squared."""
    scale = fragments.double().abs().max().clamp(min=1e-300)
    left = (fragments.double() - assemble(factors)) / scale
    return float(left.norm() / (fragments.double() / scale).norm().clamp(min=1e-300))


def lloyd(x: Tensor, n_lego: int, signed: bool, seed: int) -> float:
    """Squared error of textbook k-means or gain-shape k-means, 50 rounds from a random start."""
    pick = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:n_lego]
    bank = x[pick].clone()
    for _ in range(50):
        if signed:
            bank = torch.nn.functional.normalize(bank, dim=1)
            gain, label = max_by_size(x @ bank.T)
        else:
            label, gain = torch.cdist(x, bank).argmin(1), torch.ones(len(x), dtype=x.dtype)
        left = float((x - gain[:, None] * bank[label]).square().sum())
        for c in range(n_lego):
            mine, weight = x[label == c], gain[label == c]
            if len(mine):
                bank[c] = (weight[:, None] * mine).sum(0) / weight.square().sum()
    return left


def max_by_size(score: Tensor) -> tuple[Tensor, Tensor]:
    label = score.abs().argmax(1)
    return score.gather(1, label[:, None])[:, 0], label


def omp(x: Tensor, bank: Tensor, n_terms: int) -> Tensor:
    """Fit of each row by orthogonal matching pursuit, as in a textbook."""
    bank = torch.nn.functional.normalize(bank.double(), dim=1)
    fits = []
    for row in x.double():
        picked: list[int] = []
        left = row
        for _ in range(n_terms):
            score = (bank @ left).abs()
            score[picked] = -1
            picked.append(int(score.argmax()))
            atoms = bank[picked].T
            left = row - atoms @ torch.linalg.lstsq(atoms, row[:, None]).solution[:, 0]
        fits.append(row - left)
    return torch.stack(fits)


# ------------------------------------------------------------------------------------ exact copy


@pytest.mark.parametrize(("n_terms", "coefficients"), FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_exact_copy_bit_for_bit(n_terms: int, coefficients: bool, dtype: torch.dtype) -> None:
    x = rows(7, 5, dtype=dtype) * 1e-3
    got = cluster(x, 10, n_terms, coefficients)
    assert torch.equal(got.lego_filters, torch.cat([x, x.new_zeros(3, 5)]))
    assert torch.equal(got.index[:, 0], torch.arange(7))
    if got.coefficients is None:
        assert torch.equal(assemble(got), x.double())
        assert bool((got.index[:, 1:] >= 7).all())
    else:
        assert torch.equal(got.coefficients, torch.eye(n_terms, dtype=dtype)[:1].expand(7, -1))
    assert all(len(set(row)) == n_terms for row in got.index.tolist())


def test_exact_copy_of_as_many() -> None:
    x = rows(6, 4)
    got = cluster(x, 6, coefficients=False)
    assert torch.equal(got.lego_filters, x)
    assert got.coefficients is None
    with pytest.raises(ValueError, match="n_terms must be 1"):
        cluster(x, 6, n_terms=2, coefficients=False)


@pytest.mark.parametrize(("n_terms", "coefficients"), FORMS)
def test_fewer_distinct_rows_than_filters(n_terms: int, coefficients: bool) -> None:
    x = rows(10, 8).repeat(30, 1)
    assert error(x, cluster(x, 20, n_terms, coefficients)) == 0
    if coefficients or n_terms == 1:
        assert error(x, cluster(x, 10, n_terms, coefficients)) == 0


# ----------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize(("n_terms", "coefficients"), FORMS)
def test_same_seed_same_bytes_and_global_state_untouched(n_terms: int, coefficients: bool) -> None:
    x = rows(200, 12)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = cluster(x, 40, n_terms, coefficients, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again = cluster(x, 40, n_terms, coefficients, seed=3)
    for one, other in zip(first, again, strict=True):
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("coefficients", [True, False])
def test_several_numbers_of_terms_at_once_are_those_one_by_one(coefficients: bool) -> None:
    x = rows(150, 12)
    x[:10] = x[0]
    for n_lego in (30, 141, 145):  # 141 rows are distinct
        terms = [4, 1, 2]
        found = clusterings(x, n_lego, terms, coefficients, 3)
        for n_terms, got in zip(terms, found, strict=True):
            wanted = cluster(x, n_lego, n_terms, coefficients, 3)
            for one, other in zip(got, wanted, strict=True):
                assert one is other is None or torch.equal(one, other)


@pytest.mark.slow
def test_other_seed_differs() -> None:
    # the seed decides how fragments are dealt into blocks, so it shows only with several of them
    x = rows(4100, 4)
    first, other = (cluster(x, 128, seed=seed) for seed in (0, 1))
    assert not torch.equal(first.lego_filters, other.lego_filters)


def test_fragments_unchanged_and_no_graph() -> None:
    x = rows(64, 6).requires_grad_()
    copy = x.detach().clone()
    got = cluster(x, 16)
    assert torch.equal(x, copy)
    assert not got.lego_filters.requires_grad


# --------------------------------------------------------------------------------------- quality


@pytest.mark.slow
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_better_than_textbook_on_its_best_start(signed: bool, seed: int) -> None:
    x = rows(120, 10, seed=seed).double()
    best = min(lloyd(x, 30, signed, start) for start in range(5))
    got = cluster(x, 30, coefficients=signed)
    assert error(x, got) ** 2 * float(x.square().sum()) < best


def test_optimal_on_a_case_small_enough_to_enumerate() -> None:
    x = torch.tensor([[0.0], [1.0], [1.2], [5.0], [5.1], [9.0]])
    best = float("inf")
    for code in range(3**6):
        label = torch.tensor([code // 3**i % 3 for i in range(6)])
        parts = [x[label == c] for c in range(3)]
        best = min(best, sum(float((p - p.mean(0)).square().sum()) for p in parts if len(p)))
    got = cluster(x, 3, coefficients=False)
    assert float((x - assemble(got)).square().sum()) == pytest.approx(best, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("n_fragments", [300, 4100])
def test_every_fragment_has_its_nearest_filter(n_fragments: int) -> None:
    x = rows(n_fragments, 9).double()
    got = cluster(x, 130, coefficients=False)
    distance = torch.cdist(x, got.lego_filters)
    mine = distance.gather(1, got.index)[:, 0]
    torch.testing.assert_close(mine, distance.amin(1), rtol=1e-9, atol=1e-9)
    used = torch.bincount(got.index[:, 0], minlength=130)
    assert int(used.min()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("n_fragments", [300, 4100])
def test_every_fragment_has_its_best_filter_and_gain(n_fragments: int) -> None:
    x = rows(n_fragments, 9).double()
    got = cluster(x, 130)
    assert got.coefficients is not None
    shape = torch.nn.functional.normalize(got.lego_filters, dim=1)
    cosine = (x @ shape.T).abs()
    mine = cosine.gather(1, got.index)[:, 0]
    torch.testing.assert_close(mine, cosine.amax(1), rtol=1e-9, atol=1e-9)
    slot = got.lego_filters[got.index[:, 0]]
    gain = (x * slot).sum(1) / slot.square().sum(1)
    torch.testing.assert_close(got.coefficients[:, 0], gain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n_terms", [1, 3])
def test_coefficients_have_rms_one(n_terms: int) -> None:
    got = cluster(rows(300, 12) * 1e-4, 60, n_terms)
    assert got.coefficients is not None
    for c in range(60):
        mine = got.coefficients[got.index == c]
        assert len(mine) == 0 or float(mine.square().mean()) == pytest.approx(1, rel=1e-4)


def test_more_terms_less_error() -> None:
    x = rows(300, 24)
    signed = [error(x, cluster(x, 60, k)) for k in (1, 2, 3, 4, 6)]
    assert signed == sorted(signed, reverse=True)
    assert signed[-1] < 0.6 * signed[0]
    plain = [error(x, cluster(x, 60, k, False)) for k in (1, 2, 4)]
    assert plain == sorted(plain, reverse=True)


@pytest.mark.parametrize("n_terms", [2, 4])
def test_pursuit_equals_the_textbook(n_terms: int) -> None:
    x = rows(80, 16).double()
    got = cluster(x, 24, n_terms)
    expected = omp(x, got.lego_filters, n_terms)
    torch.testing.assert_close(assemble(got), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("n_terms", "coefficients"), FORMS)
def test_terms_of_a_slot_are_distinct(n_terms: int, coefficients: bool) -> None:
    index = cluster(rows(150, 8), 20, n_terms, coefficients).index
    assert index.dtype == torch.int64
    assert all(len(set(row)) == n_terms for row in index.tolist())


@pytest.mark.parametrize("coefficients", [True, False])
def test_planted_bank_is_found(coefficients: bool) -> None:
    bank = torch.nn.functional.normalize(rows(32, 48, seed=1), dim=1)
    label = torch.arange(160) % 32
    gain = rows(160, seed=2).sign() * (1 + rows(160, seed=3).abs())
    x = bank[label] * (gain[:, None] if coefficients else 1) + 1e-4 * rows(160, 48, seed=4)
    got = cluster(x, 32, coefficients=coefficients)
    assert error(x, got) < 1e-3
    assert len(torch.unique(torch.stack([label, got.index[:, 0]]), dim=1)[0]) == 32


def test_sum_of_planted_pairs_is_found() -> None:
    # 8 filters in 64 dimensions, each fragment the sum of two: one term cannot, two terms can
    bank = rows(8, 64, seed=1)
    first = torch.arange(224) % 8
    second = (first + 1 + torch.arange(224) % 7) % 8
    x = bank[first] * 2 - bank[second]
    assert error(x, cluster(x, 12)) > 0.2
    assert error(x, cluster(x, 12, 2)) < 0.05


@pytest.mark.slow
def test_no_worse_than_scikit_learn() -> None:
    sklearn_cluster = pytest.importorskip("sklearn.cluster")
    x = rows(600, 40) * torch.linspace(0.2, 2, 600)[:, None]
    for n_lego in (40, 150):
        rival = sklearn_cluster.KMeans(n_lego, n_init=1, random_state=0).fit(x.numpy())
        got = cluster(x, n_lego, coefficients=False)
        assert float((x - assemble(got)).square().sum()) < 1.01 * rival.inertia_


# ---------------------------------------------------------------------------------- hard inputs

HARD = {
    "one row": rows(1, 5),
    "all zero": torch.zeros(40, 6),
    "constant": torch.full((40, 6), 3.0),
    "one dimension": rows(300, 1),
    "parallel": rows(60, 1) * rows(1, 6),
    "duplicates": rows(9, 6).repeat(20, 1),
    "almost duplicates": rows(5, 8).repeat(40, 1) + 1e-7 * rows(200, 8, seed=1),
    "dead filters": torch.cat([rows(50, 6), torch.zeros(90, 6), 1e-20 * rows(60, 6)]),
    "opposite": torch.cat([torch.ones(40, 3), -torch.ones(40, 3), torch.zeros(20, 3)]),
    "orthogonal": torch.eye(40),
    "tiny": rows(80, 6) * 1e-20,
    "denormal": rows(80, 6) * 1e-42,
    "huge": rows(80, 6) * 1e15,
    "almost overflow": rows(80, 6) * 1e37,
    "twelve orders": rows(200, 6) * 10 ** (3 * rows(200, 1, seed=1)),
    "half, large": (rows(80, 6) * 1.5e4).half(),
    "half, small": (rows(80, 6) * 1e-6).half(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize(("n_terms", "coefficients"), FORMS)
def test_hard_inputs(name: str, n_terms: int, coefficients: bool) -> None:
    x = HARD[name]
    for n_lego in sorted({n_terms, 10, len(x) // 2, len(x) - 1, len(x) + 3}):
        if n_lego < n_terms or (n_lego == len(x) and n_terms > 1 and not coefficients):
            continue
        got = cluster(x, n_lego, n_terms, coefficients)
        assert got.lego_filters.shape == (n_lego, x.shape[1])
        assert got.lego_filters.dtype == x.dtype
        assert bool(got.lego_filters.isfinite().all())
        assert got.index.shape == (len(x), n_terms)
        assert 0 <= int(got.index.min()) <= int(got.index.max()) < n_lego
        if got.coefficients is not None:
            assert got.coefficients.dtype == x.dtype
            assert bool(got.coefficients.isfinite().all())
        assert error(x, got) <= 1.001  # never worse than zeros


@pytest.mark.parametrize("name", ["one dimension", "parallel", "all zero", "constant"])
def test_rank_one_needs_one_filter(name: str) -> None:
    assert error(HARD[name], cluster(HARD[name], 1)) < 1e-6


@pytest.mark.parametrize("scale", [1e-20, 1e15])
@pytest.mark.parametrize(("n_terms", "coefficients"), FORMS)
def test_error_does_not_depend_on_scale(scale: float, n_terms: int, coefficients: bool) -> None:
    x = rows(120, 8)
    one, other = (error(y, cluster(y, 30, n_terms, coefficients)) for y in (x, x * scale))
    assert one == pytest.approx(other, rel=0.02)


def test_dead_filters_cost_no_more_than_one_lego_filter() -> None:
    x = torch.cat([rows(40, 6), torch.zeros(300, 6)])
    assert error(x, cluster(x, 41, coefficients=False)) == 0
    weak = torch.cat([rows(40, 6), 1e-12 * rows(300, 6, seed=1)])
    assert error(weak, cluster(weak, 41, coefficients=False)) < 1e-6


@pytest.mark.parametrize(("n_terms", "coefficients"), FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_is_computed_in_float32(n_terms: int, coefficients: bool, dtype: torch.dtype) -> None:
    x = rows(120, 8, dtype=dtype)
    got = cluster(x, 30, n_terms, coefficients)
    full = cluster(x.float(), 30, n_terms, coefficients)
    assert torch.equal(got.index, full.index)
    assert torch.equal(got.lego_filters, full.lego_filters.to(dtype))


def test_a_shift_far_from_zero_keeps_the_detail() -> None:
    x = rows(200, 8) * 1e-3
    near, far = (cluster(y, 50, coefficients=False) for y in (x, x + 5))
    lost = [float((y.double() - assemble(f)).norm()) for y, f in ((x, near), (x + 5, far))]
    assert lost[1] == pytest.approx(lost[0], rel=0.05)


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
def test_bad_arguments(fragments: Tensor, n_lego: int, n_terms: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cluster(fragments, n_lego, n_terms)
