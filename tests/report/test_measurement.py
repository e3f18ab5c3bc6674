"""Numbers about a network, against hand computation and against fvcore's own count."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import legocompress as lego
from legocompress.report.latency import latency
from legocompress.report.macs import cheapest_routes, fvcore_macs
from legocompress.report.results import Report

IMAGE = torch.zeros(1, 3, 8, 8)
COLUMNS = ["dense_params", "params", "dense_bits", "bits", "dense_macs", "macs", "macs_used_only"]


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    ).eval()


def convert(model: nn.Module, image: Tensor = IMAGE, **settings: Any) -> nn.Module:
    return lego.convert_(model, lego.plan(model, lego.LegoSpec(**settings), image))


def check_sums(report: Report, model: nn.Module) -> None:
    totals = report.totals()
    for column in COLUMNS:
        assert totals[column] == sum(getattr(row, column) or 0 for row in report.rows)
    assert totals["params"] == sum(p.numel() for p in model.parameters())
    assert report.to_dict()["totals"] == totals


def test_a_small_network_by_hand() -> None:
    model = convert(net(), m=0.5, o=2, k=2, dtype="fp16")
    report = lego.measure(model, example_input=IMAGE)
    check_sums(report, model)
    rows = {row.name: row for row in report.rows}
    assert list(rows) == ["0", "2", "3", "6", "(other)"]

    # n=16, c=8, 8 filters of 4x3x3, 2x16x2 slots of 3 bits and a 16 bit coefficient, 64 pixels
    row = rows["2"]
    assert (row.n_lego, row.n_split, row.n_terms, row.weight_shape) == (8, 2, 2, (16, 8, 3, 3))
    assert (row.dense_params, row.params) == (1152, 8 * 36 + 64)
    assert (row.dense_bits, row.bits) == (1152 * 32, 8 * 36 * 16 + 64 * 3 + 64 * 16)
    assert (row.dense_macs, row.macs) == (1152 * 64, (8 * 36 * 2 + 64) * 64)
    assert (row.fewer_filters, row.fewer_bits, row.reason) == (True, True, None)

    # two groups of 8 channels: 8 filters of 4x3x3 run on four parts, 16 pixels
    row = rows["3"]
    assert (row.dense_macs, row.macs) == (1152 * 16, 1152 * 16)
    assert row.params == 8 * 36 + 64

    row = rows["0"]
    assert (row.params, row.bits, row.macs) == (216, 216 * 32, 216 * 64)
    assert (row.n_lego, row.fewer_bits, row.weight_error) == (None, None, None)
    assert row.reason == "stem: it sees the image"
    assert (rows["6"].params, rows["6"].macs) == (80, 80)
    assert rows["(other)"].params == 8 + 2 * 8 + 16 + 5  # biases, the norm, biases
    assert rows["(other)"].macs is None
    assert report.speedup == report.total("dense_macs") / report.total("macs") > 1
    assert report.input_shape == (1, 3, 8, 8)


def test_the_error_is_that_of_the_weights() -> None:
    dense = net()
    model = convert(copy.deepcopy(dense), m=0.5, o=2)
    report = lego.measure(model, example_input=IMAGE)
    errors = {}
    for name in ("2", "3"):
        exact, ours = dense.get_submodule(name).weight, model.get_submodule(name).weight.detach()
        exact = exact.detach()
        errors[name] = float((exact - ours).norm() / exact.norm())
        row = next(row for row in report.rows if row.name == name)
        assert row.weight_error == pytest.approx(errors[name], rel=1e-4)
    mean = math.sqrt(sum(e**2 for e in errors.values()) / 2)
    assert report.weight_error == pytest.approx(mean, rel=1e-4)
    assert 0.1 < mean < 1


def test_used_filters_only_by_hand() -> None:
    model: Any = convert(net(), m=0.5, o=2, only=["2"])
    unit = model[2]
    unit.index[0], unit.index[1] = 3, 5
    unit.index[1, 0] = 0
    row = next(r for r in lego.measure(model, example_input=IMAGE).rows if r.name == "2")
    assert row.macs == (8 * 36 * 2 + 32) * 64
    assert row.macs_used_only == (3 * 36 + 32) * 64


def test_the_checks_fail_where_expansion_was_allowed() -> None:
    model = convert(net(), m=4, o=4, k=4, allow_expansion=True)
    report = lego.measure(model, example_input=IMAGE)
    check_sums(report, model)
    row = next(row for row in report.rows if row.name == "2")
    assert (row.n_lego, row.n_terms) == (64, 1)  # every fragment, exactly
    assert row.fewer_filters is False
    assert row.fewer_bits is False
    assert row.bits > row.dense_bits
    assert row.macs == row.dense_macs  # by the assembled form, which is never slower than dense
    model = convert(net(), m=1, o=1, k=8, allow_expansion=True, only=["2"])
    unit = model.get_submodule("2")
    assert isinstance(unit, lego.LegoModule)
    row = next(r for r in lego.measure(model, example_input=IMAGE).rows if r.name == "2")
    assert row.fewer_filters is True


def test_a_dense_network_is_its_own_measure() -> None:
    report = lego.measure(net(), example_input=IMAGE)
    check_sums(report, net())
    assert report.total("bits") == report.total("dense_bits")
    assert report.speedup == 1
    assert report.weight_error is None
    assert report.fvcore_macs == report.total("macs") == 216 * 64 + 1152 * 64 + 1152 * 16 + 80


@pytest.mark.slow
def test_fvcore_agrees_on_resnet18() -> None:
    image = torch.zeros(1, 3, 64, 64)
    model = timm.create_model("resnet18", pretrained=False, num_classes=10).eval()
    dense = lego.measure(model, example_input=image)
    assert dense.fvcore_macs == dense.total("macs") == dense.total("dense_macs")
    convert(model, image, m=0.5, o=2, only=["layer[12].*"])
    report = lego.measure(model, example_input=image)
    assert report.fvcore_macs == report.total("macs")
    assert report.total("dense_macs") == dense.total("macs")
    assert report.total("macs_used_only") <= report.total("macs") < report.total("dense_macs")
    check_sums(report, model)


@pytest.mark.parametrize("settings", [{"m": 0.5, "o": 2}, {"m": 0.5, "o": 3, "k": 2},
                                      {"m": 0.25, "o": 4, "coefficients": False}])  # fmt: skip
def test_fvcore_agrees_with_linear_layers_converted(settings: dict[str, Any]) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 10, 3),
        nn.Conv2d(10, 24, 3, stride=2),
        nn.Flatten(),
        nn.Linear(24 * 9, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    ).eval()
    image = torch.zeros(1, 3, 9, 9)
    convert(model, image, linear=True, allow_expansion=True, **settings)
    assert [name for name, _ in lego.lego_modules(model)] == ["1", "3", "5"]
    report = lego.measure(model, example_input=image)
    merges = [row for row in report.rows if row.n_lego and row.macs < row.dense_macs]
    assert merges
    expected = report.total("macs")
    assert fvcore_macs(model, image) == report.fvcore_macs == expected


def test_two_names_and_calls_of_one_conv_count_once_and_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.a = nn.Conv2d(8, 8, 3, padding=1)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.stem(x)))

    model = convert(Twice().eval(), m=0.5, o=2)
    report = lego.measure(model, example_input=IMAGE)
    check_sums(report, model)
    (row,) = [row for row in report.rows if row.n_lego]
    assert (row.dense_params, row.dense_macs) == (576, 576 * 64 * 2)
    assert report.fvcore_macs == report.total("macs")


def test_stored_bytes_are_those_of_the_folder(tmp_path: Path) -> None:
    model = convert(net(), m=0.5, o=2)
    folder = lego.save(model, tmp_path / "a")
    sizes = [file.stat().st_size for file in folder.iterdir()]
    assert lego.measure(model, example_input=IMAGE, path=folder).stored_bytes == sum(sizes) > 5000
    assert lego.measure(model, example_input=IMAGE).stored_bytes is None


def test_measuring_changes_nothing() -> None:
    dense, model = net(), convert(net(), m=0.5, o=2).train()
    model[1].eval()
    model[2].eval()
    model[2].freeze()
    model[3].route = "reference"
    dense.train()
    flags = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen = model[2].frozen_weight
    report = lego.measure(model, dense, IMAGE, repeats=2)
    assert [module.training for module in model.modules()] == flags
    assert all(module.training for module in dense.modules())
    assert (model[2].route, model[3].route) == ("assemble", "reference")
    assert torch.equal(model[2].frozen_weight, frozen)
    assert model[3].frozen_weight is None
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [timing.form for timing in report.latency] == ["dense", "assembled", "reference"]


def test_a_failing_form_leaves_routes_as_they_were() -> None:
    class Refusing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("refused")

    model = convert(net(), m=0.5, o=2)
    with pytest.raises(RuntimeError, match="refused"):
        lego.measure(model, Refusing(), IMAGE, repeats=1)
    for _, unit in lego.lego_modules(model):
        assert unit.route == "assemble"
        assert unit.frozen_weight is None


def test_the_cheapest_routes_give_the_same_outputs() -> None:
    model = convert(net(), m=0.5, o=2).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        with cheapest_routes(model):
            assert [m.route for _, m in lego.lego_modules(model)] == ["reference", "assemble"]
            torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)
    assert [m.route for _, m in lego.lego_modules(model)] == ["assemble", "assemble"]
    assert expected.std() > 0


def test_a_slower_form_has_a_ratio_below_one() -> None:
    small, large = torch.randn(64, 64), torch.randn(768, 768)
    order: list[str] = []

    def form(name: str, matrix: Tensor) -> Any:
        return lambda: (order.append(name), matrix @ matrix)

    forms = {"first": form("first", small), "second": form("second", large)}
    first, second = latency(forms, torch.zeros(3, 1), repeats=5)
    assert order == ["first", "second"] * 6  # interleaved, one round of warming up
    assert first.ratio == 1
    assert second.ratio < 0.5
    assert second.median_ms > first.median_ms > 0
    assert second.quartiles_ms[0] <= second.median_ms <= second.quartiles_ms[1]
    assert (first.batch, first.repeats, first.device, first.dtype) == (3, 5, "cpu", "float32")
    assert first.threads == torch.get_num_threads()
    (once,) = latency({"a": forms["first"]}, torch.zeros(1, 1), repeats=1)
    assert once.quartiles_ms == (once.median_ms, once.median_ms)
