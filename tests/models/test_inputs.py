"""Example inputs become arguments of `forward`, and required inputs are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import legocompress as lego
from legocompress.errors import UsageError
from legocompress.models.inputs import (
    Arguments,
    check_one_input,
    name_inputs,
    required_inputs,
    to_arguments,
)
from tests.support.structures import TwoInputs

X, Y = torch.ones(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)


class Optional(nn.Module):
    def forward(self, x: Tensor, scale: float = 1.0, *, flip: bool = False) -> Tensor:
        return x * scale * (1 - 2 * flip)


@pytest.mark.parametrize(
    ("example", "args", "kwargs"),
    [
        (X, (X,), {}),
        ([X], ([X],), {}),
        ((X, 2.0), (X, 2.0), {}),
        ({"scale": 2.0, "x": X}, (X, 2.0), {}),
        ({"x": X, "flip": True}, (X,), {"flip": True}),
    ],
)
def test_arguments(example: Any, args: Any, kwargs: Any) -> None:
    arguments = to_arguments(Optional(), example)
    assert arguments == Arguments(args, kwargs)
    assert [id(x) for x in arguments.float_tensors()] == [id(X)]
    assert arguments.are_float_tensors() == (args == (X,) and not kwargs)


@pytest.mark.parametrize("example", [X, (X, Y, X), {"x": X}, {"x": X, "z": Y}])
def test_what_does_not_fit(example: Any) -> None:
    with pytest.raises(UsageError, match=r"example_input does not fit.*\(x: .*, y: .*tuple.*dict"):
        to_arguments(TwoInputs(), example)


def test_required_inputs_and_their_names() -> None:
    assert required_inputs(TwoInputs()) == name_inputs(TwoInputs(), 2) == ["x", "y"]
    assert required_inputs(Optional()) == ["x"]
    assert name_inputs(Optional(), 1) == ["image"]
    assert required_inputs(nn.DataParallel(nn.Conv2d(3, 3, 1))) == []
    check_one_input(Optional(), "calibrate_")
    with pytest.raises(UsageError, match=r"^calibrate_ takes .* forward takes 2 \(x, y\)"):
        check_one_input(TwoInputs(), "calibrate_")


def test_plan_and_measure_take_every_kind_of_example() -> None:
    network = TwoInputs()
    plans = [lego.plan(network, example_input=e) for e in ((X, Y), {"y": Y, "x": X})]
    assert plans[0].rows == plans[1].rows
    assert plans[0].rows[0].dense_macs == 2 * 6 * 6 * 8 * 27
    model = lego.convert_(
        network, lego.plan(network, lego.LegoSpec(allow_expansion=True), {"x": X, "y": Y})
    )
    report = lego.measure(model, TwoInputs(), {"x": X, "y": Y}, repeats=1)
    assert report.input_shape == (1, 3, 8, 8)
    assert report.fvcore_macs == lego.measure(model, example_input=(X, Y)).fvcore_macs
    assert report.fvcore_macs is not None
    assert [(row.form, row.batch) for row in report.latency] == [
        ("dense", 1), ("assembled", 1), ("reference", 1),
    ]  # fmt: skip
    with pytest.raises(UsageError, match="2 \\(x, y\\)"):
        lego.benchmark(model)
