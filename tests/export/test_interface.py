"""Inputs and outputs of exported files: several inputs, outputs of any structure, names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import legocompress as lego
from legocompress.errors import ExportError, UsageError
from legocompress.export.interface import (
    make_example_inputs,
    make_unique,
    measure_differences,
    name_outputs,
)
from tests.support.structures import ModelOutput, Pair, Result, Structured, TwoInputs, converted

X = torch.zeros(1, 3, 8, 8)
INFINITE = (float("inf"), float("inf"))


def program_of(model: nn.Module, path: Path, example: Any = X) -> Callable[..., Any]:
    exported = lego.export_program(model, path, example_input=example)
    assert exported.relative_difference < 1e-5
    program: Callable[..., Any] = torch.export.load(exported.path).module()
    return program


@pytest.mark.slow
def test_a_program_returns_plain_containers(tmp_path: Path) -> None:
    model = converted(Structured(lambda maps, logits: Result({"maps": maps, "n": 3}, None)), X)
    x = torch.randn(4, 3, 8, 8)
    output = program_of(model, tmp_path / "x.pt2")(x)
    assert (output["logits"]["n"], output["more"]) == (3, None)
    torch.testing.assert_close(output["logits"]["maps"], model(x).logits["maps"])


@pytest.mark.slow
def test_a_program_of_two_inputs(tmp_path: Path) -> None:
    model = converted(TwoInputs(), (X, X))
    x, y = torch.randn(2, 5, 3, 8, 8)
    for number, example in enumerate(((X, X), {"y": X, "x": X})):
        output = program_of(model, tmp_path / f"{number}.pt2", example)(x, y)
        torch.testing.assert_close(output, model(x, y))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["lego", "dense"])
def test_an_onnx_file_names_its_outputs_and_leaves_out_what_is_no_tensor(
    form: Any, tmp_path: Path
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network = Structured(
        lambda maps, logits: ModelOutput(logits={"a": logits, "add": logits + 1}, maps=(maps, "s"))
    )
    model, x = converted(network, X), torch.randn(4, 3, 8, 8)
    lego.export_onnx(model, tmp_path / "x.onnx", form, example_input=X)
    session = runtime.InferenceSession(str(tmp_path / "x.onnx"))
    assert [value.name for value in session.get_outputs()] == ["logits.a", "logits.add", "maps.0"]
    a, add, maps = map(torch.from_numpy, session.run(None, {"image": x.numpy()}))
    output = model(x)
    torch.testing.assert_close(a, output.logits["a"])
    torch.testing.assert_close(add, output.logits["add"])
    torch.testing.assert_close(maps, output.maps[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_onnx_file_of_two_inputs(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, (x, y) = converted(TwoInputs(), (X, X)), torch.randn(2, 4, 3, 8, 8)
    lego.export_onnx(model, tmp_path / "x.onnx", example_input=(X, X))
    session = runtime.InferenceSession(str(tmp_path / "x.onnx"))
    assert [value.name for value in session.get_inputs()] == ["x", "y"]
    (output,) = session.run(None, {"y": y.numpy(), "x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(x, y), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_exported_is_told(tmp_path: Path) -> None:
    model = converted(Structured(lambda maps, _: {"maps": maps, "kind": ["s"]}), X)
    with pytest.raises(ExportError, match=r"a str at 'kind.0'"):
        lego.export_program(model, tmp_path / "x", example_input=X)
    with pytest.raises(ExportError, match=r"by position, and example_input has list"):
        lego.export_program(model, tmp_path / "x", example_input=([X[0]],))
    two = converted(TwoInputs(), (X, X))
    with pytest.raises(UsageError, match=r"example_input does not fit.*'y'"):
        lego.export_program(two, tmp_path / "x", example_input=X)
    with pytest.raises(ExportError, match=r"one N; .* \(1, 3, 8, 8\), \(2, 3, 8, 8\)"):
        lego.export_program(two, tmp_path / "x", example_input=(X, X.expand(2, 3, 8, 8)))
    assert not list(tmp_path.iterdir())


def test_example_inputs_are_random_batches() -> None:
    a, b = make_example_inputs(TwoInputs(), {"y": X[..., :4], "x": X.half()}, 3)
    assert (a.shape, b.shape, a.dtype) == ((3, 3, 8, 8), (3, 3, 8, 4), torch.float32)
    assert a.std() > 0.1


def test_names_of_outputs() -> None:
    assert name_outputs(X) == name_outputs((X, None)) == ["output"]
    assert name_outputs([X, (X, 1)]) == ["output_0", "output_1.0"]
    assert name_outputs({"out": X, "aux": None}) == ["out"]
    assert name_outputs(Pair(X, {"a": [X, X]})) == ["maps", "others.a.0", "others.a.1"]
    assert list(make_unique(["a", "image", "a"], {"image"})) == ["a", "image_1", "a_1"]


def test_differences_of_structures() -> None:
    a, b = torch.tensor([1.0, -4.0]), torch.tensor([1.0, -3.0])
    others = {"n": None, "k": 3}
    assert measure_differences({"a": a, **others}, {"a": b, **others}) == (1, 0.25)
    assert measure_differences((a, None), (a, 0)) == INFINITE
    assert measure_differences((a, 3), (a, 4)) == INFINITE
    assert measure_differences((a, a), (a,)) == INFINITE
    assert measure_differences(a, a[:1]) == INFINITE
    assert measure_differences((a, torch.tensor([1, 2])), (a, torch.tensor([1, 3]))) == (0, 0.5)
    masked = torch.tensor([1.0, -torch.inf, torch.nan])
    assert measure_differences(masked, masked) == (0, 0)
    assert measure_differences(masked, masked.flip(0)) == INFINITE
    assert measure_differences(torch.ones(2), torch.tensor([1.0, torch.nan])) == INFINITE
    assert measure_differences(torch.ones(0), torch.ones(0)) == (0, 0)
