"""Sizes and costs of a network equal those computed by hand and by fvcore."""

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
from legocompress.report.results import Report
from tests.support.measuring import IMAGE, convert, make_network

COLUMNS = ["dense_params", "params", "dense_bits", "bits", "dense_macs", "macs", "macs_used_only"]


def check_sums(report: Report, model: nn.Module) -> None:
    totals = report.totals()
    for column in COLUMNS:
        assert totals[column] == sum(getattr(row, column) or 0 for row in report.rows)
    assert totals["params"] == sum(p.numel() for p in model.parameters())
    assert report.to_dict()["totals"] == totals


def test_a_small_network_equals_hand_computation() -> None:
    model = convert(make_network(), m=0.5, o=2, k=2, dtype="fp16")
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


def test_the_weight_error_is_relative_to_the_dense_weight() -> None:
    dense = make_network()
    model = convert(copy.deepcopy(dense), m=0.5, o=2)
    report = lego.measure(model, example_input=IMAGE)
    errors = {}
    for name in ("2", "3"):
        exact = dense.get_submodule(name).weight.detach()
        assembled = model.get_submodule(name).weight.detach()
        errors[name] = float((exact - assembled).norm() / exact.norm())
        row = next(row for row in report.rows if row.name == name)
        assert row.weight_error == pytest.approx(errors[name], rel=1e-4)
    mean = math.sqrt(sum(e**2 for e in errors.values()) / 2)
    assert report.weight_error == pytest.approx(mean, rel=1e-4)
    assert 0.1 < mean < 1


def test_macs_of_used_filters_equal_hand_computation() -> None:
    model: Any = convert(make_network(), m=0.5, o=2, only=["2"])
    unit = model[2]
    unit.index[0], unit.index[1] = 3, 5
    unit.index[1, 0] = 0
    row = next(r for r in lego.measure(model, example_input=IMAGE).rows if r.name == "2")
    assert row.macs == (8 * 36 * 2 + 32) * 64
    assert row.macs_used_only == (3 * 36 + 32) * 64


def test_the_conditions_fail_where_expansion_is_allowed() -> None:
    model = convert(make_network(), m=4, o=4, k=4, allow_expansion=True)
    report = lego.measure(model, example_input=IMAGE)
    check_sums(report, model)
    row = next(row for row in report.rows if row.name == "2")
    assert (row.n_lego, row.n_terms) == (64, 1)  # every fragment, exactly
    assert row.fewer_filters is False
    assert row.fewer_bits is False
    assert row.bits > row.dense_bits
    assert row.macs == row.dense_macs  # of the assembled form, which has as many MACs as dense
    model = convert(make_network(), m=1, o=1, k=8, allow_expansion=True, only=["2"])
    unit = model.get_submodule("2")
    assert isinstance(unit, lego.LegoModule)
    row = next(r for r in lego.measure(model, example_input=IMAGE).rows if r.name == "2")
    assert row.fewer_filters is True


def test_a_dense_network_reports_no_compression() -> None:
    report = lego.measure(make_network(), example_input=IMAGE)
    check_sums(report, make_network())
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


def test_a_conv_with_two_names_has_its_parameters_counted_once_and_its_calls_twice() -> None:
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


def test_stored_bytes_are_the_sizes_of_the_files(tmp_path: Path) -> None:
    model = convert(make_network(), m=0.5, o=2)
    folder = lego.save(model, tmp_path / "a")
    sizes = [file.stat().st_size for file in folder.iterdir()]
    assert lego.measure(model, example_input=IMAGE, path=folder).stored_bytes == sum(sizes) > 5000
    assert lego.measure(model, example_input=IMAGE).stored_bytes is None


def test_measure_changes_nothing() -> None:
    dense, model = make_network(), convert(make_network(), m=0.5, o=2).train()
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
