"""Calibration: its closed form against plain sums, its shortcuts against the long way, repairs."""

from __future__ import annotations

import copy
import itertools
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, StdConv2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import legocompress as lego
from legocompress.calibrate import FEWEST, gather, joint, layers, lego_values
from legocompress.calibrate.basis import input_bases
from legocompress.calibrate.front import Front
from legocompress.calibrate.journal import Journal
from legocompress.calibrate.moments import Moments
from legocompress.calibrate.record import LayerRepair
from legocompress.calibrate.solve import Unit, _improve_bank, _improve_slots, fit_unit
from legocompress.calibrate.stream import run_to
from legocompress.calibrate.synthetic import _mismatch
from legocompress.errors import ConversionError, DataError
from legocompress.spec import UnitShape

DEMO = Path(str(files("legocompress") / "demo"))
NAME = f"local-dir:{DEMO / 'fashion-resnet'}"


def demo_images(n_images: int) -> Tensor:
    network = lego.create(NAME)
    images = lego.open_images(str(DEMO / "fashion-calibration.npz"), network, labels=False)
    return gather(images.batches(64), n_images)


def converted(network: nn.Module, **spec: Any) -> nn.Module:
    student = copy.deepcopy(network)
    return lego.convert_(student, lego.plan(student, lego.LegoSpec(**spec)))


# Moments


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


# The solver


def problem(
    groups: int, n_terms: int, signed: bool, parts: int = 1
) -> tuple[Unit, Moments, Moments]:
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
    return Unit(shape, torch.randn(m, d, generator=generator), index, gains), both[0], both[1]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("n_terms", [1, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_no_step_raises_the_error(groups: int, n_terms: int, signed: bool, parts: int) -> None:
    unit, seen, _ = problem(groups, n_terms, signed, parts)
    errors = [seen.error(unit.filters())]
    for step in (_improve_slots, _improve_bank, _improve_slots, _improve_bank):
        unit = step(unit, seen)
        errors.append(seen.error(unit.filters()))
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.9 * errors[0]
    picks = unit.index.sort(-1).values
    assert bool((picks[..., 1:] > picks[..., :-1]).all())  # distinct in a slot


def test_the_bank_is_that_of_least_squares() -> None:
    unit, seen, _ = problem(1, 1, True)
    for _ in range(20):
        unit = _improve_bank(unit, seen)
    m, d = unit.bank.shape
    columns = []
    for number in range(m * d):
        basis = torch.zeros(m * d)
        basis[number] = 1
        columns.append(unit.filters(basis.reshape(m, d)).flatten())
    design = torch.stack(columns, 1).double()
    square = torch.kron(torch.eye(12), seen.square[0, 0]).double()
    normal = design.T @ square @ design
    right = design.T @ seen.cross.double().flatten()
    best = torch.linalg.lstsq(normal, right, driver="gelsd").solution
    filters = unit.filters(best.reshape(m, d).float())
    assert seen.error(unit.filters()) == pytest.approx(seen.error(filters), abs=1e-4)


def test_a_fit_is_never_worse_on_held_out_samples() -> None:
    for n_terms in (1, 2):
        unit, seen, held_out = problem(1, n_terms, True)
        fitted = fit_unit(unit, seen, held_out, 0)
        assert held_out.error(fitted.filters()) < held_out.error(unit.filters())
        again = fit_unit(fitted, seen, held_out, 0)
        assert held_out.error(again.filters()) <= held_out.error(fitted.filters())


# Patches and calls


@pytest.mark.parametrize("kwargs", [
    {"padding": 1}, {"stride": 2, "padding": (0, 2)}, {"dilation": 2, "padding": "same"},
    {"groups": 2, "padding": "valid"}, {"padding": 1, "padding_mode": "reflect"},
])  # fmt: skip
def test_patches_times_weight_is_the_output(kwargs: dict[str, Any]) -> None:
    conv = nn.Conv2d(4, 6, 3, bias=False, **kwargs)
    x = torch.randn(2, 4, 7, 9)
    (call,) = run_to(nn.Sequential(conv), conv, 1, x)
    y = conv(x)
    assert call.size == tuple(y.shape[2:])
    image = torch.arange(2).repeat_interleave(call.size[0] * call.size[1])
    position = torch.arange(call.size[0] * call.size[1]).repeat(2)
    groups = kwargs.get("groups", 1)
    patches = call.patches(image, position, 5)
    weight = F.pad(conv.weight, (0, 0, 0, 0, 0, 5 - 4 // groups)).reshape(groups, 6 // groups, -1)
    found = torch.einsum("pgd,gnd->pgn", patches, weight).flatten(1)
    assert torch.allclose(found, y.movedim(1, -1).reshape(-1, 6), atol=1e-5)


@pytest.mark.parametrize("cls", [Conv2dSame, StdConv2d])
def test_a_call_has_the_weight_and_input_that_the_class_made(cls: type[nn.Conv2d]) -> None:
    conv = cls(3, 4, 3, stride=2, bias=False)
    (call,) = run_to(nn.Sequential(conv, nn.ReLU()), conv, 1, x := torch.randn(1, 3, 8, 8))
    assert torch.allclose(F.conv2d(call.x, call.weight, None, call.stride), conv(x), atol=1e-6)


def test_a_linear_layer_is_a_call_of_one_pixel_each() -> None:
    linear = nn.Linear(5, 3)
    (call,) = run_to(nn.Sequential(linear), linear, 1, torch.randn(2, 4, 5))
    assert call.x.shape == (8, 5, 1, 1)
    assert call.size == (1, 1)


class Twice(nn.Module):
    """One conv called twice, a skip over all of it, and a branch that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 8, 1)
        self.unused = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.stem(x)
        y = self.shared(self.shared(first).relu_()).relu_()
        return torch.as_tensor((self.last(y) + first).mean((2, 3)))


def test_calls_of_a_shared_layer_are_all_caught() -> None:
    network = Twice()
    x = torch.randn(2, 3, 6, 6)
    first, second = run_to(network, network.shared, 2, x)
    assert torch.equal(first.x[..., 1:-1, 1:-1], network.stem(x))
    assert torch.equal(second.x[..., 1:-1, 1:-1], network.shared(network.stem(x)).relu())


# The front


def test_running_on_from_a_cut_gives_the_same_calls() -> None:
    network = lego.create(NAME)
    student = converted(network).eval()
    images = demo_images(12)
    front = Front((network, student), torch.split(images, 5))
    for name, _ in list(lego.lego_modules(student)):
        front.advance(name)
        for number, (original, model, batch) in enumerate(front.batches()):
            for net in (original, model):
                (call,) = run_to(net, net.get_submodule(name), 1, batch)
                with torch.no_grad():
                    plain = copy.deepcopy(net)
                    for module in plain.modules():
                        module.__dict__.pop("forward", None)
                    (wanted,) = run_to(plain, plain.get_submodule(name), 1, batch)
                assert torch.equal(call.x, wanted.x), (name, number)
    # A stage ends with its last block, so the outermost of the two is named.
    wanted_cuts = "maxpool layer1.0 layer1 layer2.0 layer2 layer3.0 layer3"
    assert front.passed == wanted_cuts.split()
    assert not any("forward" in module.__dict__ for module in student.modules())


def test_no_cut_is_made_across_a_skip() -> None:
    network = Twice().eval()
    front = Front((network, network), [torch.randn(4, 3, 6, 6)])
    front.advance("last")
    assert front.passed == ["stem"]


def test_a_small_budget_keeps_nothing_and_changes_nothing() -> None:
    network = Twice().eval()
    images = torch.randn(4, 3, 6, 6)
    front = Front((network, network), [images], budget=10)
    front.advance("last")
    (both,) = [run_to(m, m.get_submodule("last"), 1, x) for _, m, x in front.batches()]
    (wanted,) = run_to(network, network.last, 1, images)
    assert torch.equal(both[0].x, wanted.x)


# The whole


@pytest.fixture(scope="module")
def repaired() -> tuple[nn.Module, nn.Module, lego.Calibration]:
    original = lego.create(NAME)
    student = converted(original)
    record = lego.calibrate_(student, original, demo_images(120), epochs=12)
    return student, original, record


def test_a_broken_network_does_again_what_the_original_does(
    repaired: tuple[nn.Module, nn.Module, lego.Calibration],
) -> None:
    student, original, record = repaired
    assert record.agreement_before is not None
    assert record.agreement_after is not None
    assert record.agreement_before < 40
    assert record.agreement_after > 75
    assert record.error_after < 0.5 < record.error_before
    assert record.epochs == 12
    rows = {row.name: row for row in record.layers}
    assert set(rows) == {name for name, _ in lego.lego_modules(student)}
    for row in rows.values():
        assert row.before is not None
        assert row.after is not None
        assert row.after <= row.before
    with np.load(DEMO / "fashion-sample.npz") as file:
        labels = torch.from_numpy(file["labels"].astype(np.int64))
    images = lego.open_images(str(DEMO / "fashion-sample.npz"), original)
    with torch.no_grad():
        picks = torch.cat([student(x).argmax(1) for x, _ in images.batches(250)])
    assert float((picks == labels).float().mean()) > 0.7  # images that no step has seen


def test_the_checkpoint_keeps_the_record_and_the_values(
    repaired: tuple[nn.Module, nn.Module, lego.Calibration], tmp_path: Path
) -> None:
    student, _, record = repaired
    again = lego.load(lego.save(student, tmp_path / "folder"))
    assert again.lego_calibration == record
    x = torch.randn(2, 1, 56, 56)
    with torch.no_grad():
        assert torch.equal(again(x), student.eval()(x))


def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    original = lego.create(NAME)
    images = demo_images(40)
    whole, broken = converted(original), converted(original)
    wanted = lego.calibrate_(whole, original, images, epochs=1)
    count = 0

    def interrupt(row: LayerRepair) -> None:
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt

    kwargs: dict[str, Any] = {"epochs": 1, "journal": tmp_path / "kept"}
    with pytest.raises(KeyboardInterrupt):
        lego.calibrate_(broken, original, images, on_layer=interrupt, **kwargs)
    assert len(list((tmp_path / "kept").iterdir())) == 5
    resumed = converted(original)
    assert lego.calibrate_(resumed, original, images, **kwargs) == wanted
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_a_journal_of_another_run_is_passed_over(tmp_path: Path) -> None:
    layer = dict(lego.lego_modules(converted(lego.create(NAME))))["layer1.0.conv1"]
    row = LayerRepair(name="layer1.0.conv1", before=0.5, after=0.25)
    Journal(tmp_path, "one").put(row, layer)
    assert Journal(tmp_path, "one").take_(row.name, layer) == row
    assert Journal(tmp_path, "two").take_(row.name, layer) is None
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"damaged")
    assert Journal(tmp_path, "one").take_(row.name, layer) is None


class Odd(nn.Module):
    """Grouped, strided, standardised, shared and linear layers, and one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=2)
        self.standard = StdConv2d(32, 24, 3, padding=1, bias=False)
        self.same = Conv2dSame(24, 32, 3, stride=2)
        self.shared = nn.Conv2d(32, 32, 1, bias=False)
        self.unused = nn.Conv2d(32, 32, 1)
        self.head = nn.Linear(32, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = self.standard(self.grouped(self.stem(x).relu()).relu()).relu()
        x = self.same(x)
        x = x + self.shared(self.shared(x).relu())
        return torch.as_tensor(self.head(x.mean((2, 3))))


@pytest.mark.parametrize(("coefficients", "k"), [(True, 1), (True, 2), (False, 1)])
def test_every_kind_of_layer_gets_no_worse(coefficients: bool, k: int) -> None:
    original = Odd().eval()
    student = converted(
        original, m=0.5, o=2, k=k, coefficients=coefficients, linear=True, allow_expansion=True
    )
    images = torch.randn(40, 3, 12, 12)
    record = lego.calibrate_(student, original, images, epochs=1)
    rows = {row.name: row for row in record.layers}
    assert rows["unused"].note == "never ran"
    repaired = [row for name, row in rows.items() if name != "unused"]
    assert {row.name for row in repaired} >= {"grouped", "standard", "same", "shared", "head"}
    for row in repaired:
        assert row.before is not None
        assert row.after is not None
        assert row.after <= row.before
    assert record.error_after < record.error_before
    if coefficients:
        assert sum(row.after < 0.95 * row.before for row in repaired) >= 4  # type: ignore[operator]


def test_a_wide_layer_is_repaired_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "WIDEST", 16)
    original = Odd().eval()
    student = converted(original, m=0.5, o=2)
    record = lego.calibrate_(student, original, torch.randn(40, 3, 12, 12), epochs=0)
    assert record.error_after < record.error_before
    assert record.epochs == 0


def test_an_exact_network_stays_as_it_is() -> None:
    original = Odd().eval()
    student = converted(original, m=2.0, o=2, allow_expansion=True)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    record = lego.calibrate_(student, original, torch.randn(20, 3, 12, 12), epochs=1)
    assert record.error_after <= record.error_before < 1e-3
    for key, value in student.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_flags_hooks_and_gradients_are_given_back() -> None:
    original, images = Odd().train(), torch.randn(20, 3, 12, 12)
    student = converted(original).train()
    student.stem.weight.requires_grad_(False)  # type: ignore[union-attr]
    lego.calibrate_(student, original, images, epochs=1)
    assert student.training
    assert original.training
    assert not student.stem.weight.requires_grad  # type: ignore[union-attr]
    assert all(p.grad is None for p in student.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in student.modules())
    others = {k: v for k, v in original.state_dict().items() if k.startswith("stem")}
    assert all(torch.equal(student.state_dict()[key], value) for key, value in others.items())


def test_dead_channels_and_fewer_samples_than_inputs_do_no_harm() -> None:
    original = Odd().eval()
    with torch.no_grad():
        original.stem.weight[4:].zero_()
        original.stem.bias[4:].fill_(-1.0)  # type: ignore[index]
    student = converted(original, m=0.5, o=2, k=2)
    images = torch.randn(FEWEST, 3, 6, 6)  # 8 images of 2 x 2 pixels for 216 inputs
    record = lego.calibrate_(student, original, images, epochs=2)
    assert record.error_after < record.error_before
    for row in record.layers:
        if row.note is None:
            assert row.after is not None
            assert row.before is not None
            assert row.after <= row.before
    assert all(bool(value.isfinite().all()) for value in student.state_dict().values())


def test_images_are_mirrored_and_blended() -> None:
    images = torch.arange(64.0).reshape(64, 1, 1, 1).expand(-1, 3, 2, 2).clone()
    images[..., 1] += 1000.0  # tells the sides apart
    varied = joint._varied(images, torch.Generator().manual_seed(0), blend=True)
    assert varied.is_contiguous(memory_format=torch.channels_last)
    again = joint._varied(images, torch.Generator().manual_seed(0), blend=True)
    assert torch.equal(varied, again)
    sides = (varied[:, 0, 0, 1] - varied[:, 0, 0, 0]) / 1000  # 1 as it was, -1 mirrored
    assert bool((sides.abs() <= 1 + 1e-4).all())
    assert sides.min() < -0.9
    assert sides.max() > 0.9
    own, before = images[..., 0].mean((1, 2)), images.roll(1, 0)[..., 0].mean((1, 2))
    level = varied.mean((1, 2, 3)) - 500.0
    assert bool((level >= torch.minimum(own, before) - 0.1).all())
    assert bool((level <= torch.maximum(own, before) + 0.1).all())
    pure = joint._varied(images, torch.Generator().manual_seed(0), blend=False)
    mirrored = (pure == images.flip(3)).flatten(1).all(1)
    assert bool((mirrored | (pure == images).flatten(1).all(1)).all())
    assert 16 < int(mirrored.sum()) < 48


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_tuning_leaves_layouts_as_they_were(layout: torch.memory_format) -> None:
    original = Odd().eval().to(memory_format=layout)  # type: ignore[call-overload]
    student = converted(original)
    strides = [p.stride() for n in (student, original) for p in n.parameters()]
    values, images = lego_values(student), torch.randn(16, 3, 12, 12)
    before = joint.output_error(student, original, [images])
    bases = input_bases(student, [layer for _, layer in lego.lego_modules(student)], images)
    joint.tune_(student, original, images, values, [], 6, 8, 0, 4e-3, bases)
    assert joint.output_error(student, original, [images]) < before
    assert [p.stride() for n in (student, original) for p in n.parameters()] == strides


@pytest.mark.parametrize(("error", "chosen"), [(1.2, 4e-3), (1.5, 1e-3), (torch.nan, 1e-3)])
def test_a_low_rate_must_lead_by_more_than_a_short_trial_gives_it(
    error: float, chosen: float
) -> None:
    found = iter([error, 1.0])
    rates: list[float] = []
    joint.tune_at_chosen_rate_(
        nn.Linear(1, 1), lambda rate, **_: rates.append(rate), lambda: next(found), epochs=2
    )
    assert rates == [4e-3, 1e-3, chosen]


def test_filters_are_tuned_where_their_inputs_are_uncorrelated() -> None:
    mix = torch.randn(6, 6)
    images = torch.einsum("ij,njhw->nihw", mix, torch.randn(32, 6, 8, 8))
    model = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 8, 1))
    lego.convert_(model, lego.plan(model, lego.LegoSpec(m=0.5, o=2, only=["0"])))
    (_, layer), *_ = lego.lego_modules(model)
    assert isinstance(model[1], nn.Conv2d)
    bases = input_bases(model, [layer, model[1]], images)
    fragments = F.unfold(images, 3, padding=1).mT.reshape(-1, 27).double()
    inputs = model[0](images).detach().movedim(1, 3).reshape(-1, 8).double()
    for filters, seen in ((layer.lego_filters, fragments), (model[1].weight, inputs)):
        basis = bases[filters].double()
        torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis)).double())
        turned = basis.T @ (seen.T @ seen) @ basis
        assert (turned - turned.diag().diag()).norm() < 1e-3 * turned.norm()


def test_filters_that_saw_nothing_finite_are_tuned_as_they_are() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    assert not input_bases(model, [model[0]], torch.full((4, 3, 2, 2), torch.nan))


@pytest.mark.parametrize("rates", [(1e6, 4e-3), (4e-3, 1e6)])
def test_tuning_takes_the_rate_that_serves_better(
    monkeypatch: pytest.MonkeyPatch, rates: tuple[float, ...]
) -> None:
    original, images = Odd().eval(), torch.randn(40, 3, 12, 12)
    alone, chosen = converted(original), converted(original)
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(joint, "RATES", (4e-3,))
    lego.calibrate_(alone, original, images, epochs=2)
    monkeypatch.setattr(joint, "RATES", rates)
    record = lego.calibrate_(
        chosen, original, images, epochs=2, on_batch=lambda *counts: told.append(counts)
    )
    assert record.epochs == 2
    for name, value in alone.state_dict().items():
        assert torch.equal(chosen.state_dict()[name], value), name
    steps = 4 * 8  # two trials of a pass and two passes; 32 images by fours
    assert told == [(done + 1, steps) for done in range(steps)]


def test_norm_statistics_are_those_of_the_images() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    images = 3 * torch.randn(40, 3, 6, 6) + 1
    joint.reestimate_norms_(network, torch.split(images, 10))
    norm = network[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert not norm.training
    assert norm.momentum == 0.1
    assert torch.allclose(norm.running_mean, network[0](images).mean((0, 2, 3)), atol=1e-3)


def test_too_few_images_and_a_foreign_original_are_refused() -> None:
    original = lego.create(NAME)
    student = converted(original)
    with pytest.raises(DataError, match="9 images are too few"):
        gather([torch.zeros(9, 1, 8, 8)], 100)
    with pytest.raises(DataError, match="differ in size"):
        gather([torch.zeros(9, 1, 8, 8), torch.zeros(9, 1, 4, 8)], 100)
    with pytest.raises(DataError, match="too few"):
        lego.calibrate_(student, original, torch.zeros(FEWEST - 1, 1, 56, 56))
    with pytest.raises(ConversionError, match="has no layer"):
        lego.calibrate_(student, nn.Conv2d(1, 1, 1), torch.zeros(20, 1, 56, 56))


def test_gather_takes_the_first_images_and_drops_labels() -> None:
    batches = [(torch.full((8, 1, 2, 2), float(n)), torch.zeros(8)) for n in range(4)]
    images = gather(batches, 20)
    assert images.shape == (20, 1, 2, 2)
    assert images[:, 0, 0, 0].tolist() == [0.0] * 8 + [1.0] * 8 + [2.0] * 4


def test_noise_is_shaped_to_the_norms() -> None:
    original = lego.create(NAME)
    before = lego.synthesise(original, 16, steps=0)
    images = lego.synthesise(original, 16, steps=15)
    norms: list[_BatchNorm] = [m for m in original.modules() if isinstance(m, _BatchNorm)]
    with torch.no_grad():
        assert _mismatch(original, norms, images) < 0.5 * _mismatch(original, norms, before)
    assert images.shape == (16, 1, 56, 56)
    assert torch.equal(images, lego.synthesise(original, 16, steps=15))
    with pytest.raises(DataError, match="no BatchNorm"):
        lego.synthesise(Odd(), 16)
