"""Quantised networks as ONNX: what they compute, what they hold, and what runtimes make of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import legocompress as lego
from legocompress.errors import QuantizationError
from legocompress.export import onnx_file
from legocompress.export.qdq_layers import PlainConv
from legocompress.export.qdq_network import build_rounded_network
from tests.support.quantizing import SIDE, small_images, small_network

FORMS: tuple[Any, ...] = onnx_file.FORMS


class Tiny(nn.Module):
    """Two convs around a residual sum, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (self.body(x) + x).relu()
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Branching(nn.Module):
    """Looks at values, so only its parts are traced and quantised."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.second = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y if float(y.sum()) < 1e9 else -y)  # type: ignore[no-any-return]


def tiny() -> nn.Module:
    torch.manual_seed(0)
    model = Tiny().eval()
    spec = lego.LegoSpec(m=0.5, o=2, allow_expansion=True)
    lego.convert_(model, lego.plan(model, spec, torch.zeros(1, 3, SIDE, SIDE)))
    return lego.quantize_(model, small_images())


def change(expected: Tensor, actual: Tensor) -> float:
    return float((actual - expected).norm() / (expected - expected.mean(0)).norm())


@pytest.mark.parametrize("form", FORMS)
def test_rounding_in_float_computes_nearly_what_the_integers_do(form: Any) -> None:
    model = lego.quantize_(small_network(), small_images())
    images = small_images(16, seed=3)
    rounded = build_rounded_network(model, form)
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(rounded.emulation(images), expected)
        actual = rounded.hollow(images, rounded.tensors)
    assert 0 < change(expected, actual) < 0.05
    assert {"a.filters", "a.coefficients"} <= set(rounded.names) or form == "dense"
    assert ("a.values" in rounded.names) == (form == "dense")
    dtypes = {
        name: t.dtype for name, t in zip(rounded.names, rounded.tensors.values(), strict=True)
    }
    assert dtypes["head.values"] == dtypes["stem.values"] == torch.int8
    assert dtypes["head.bias"] == torch.int32


def test_parts_are_rounded_in_their_place() -> None:
    torch.manual_seed(0)
    model = lego.quantize_(Branching().eval(), small_images())
    record = lego.lego_state(model).quantization
    assert record is not None
    assert set(record.parts) == {"first", "second"}
    images = small_images(8, seed=3)
    rounded = build_rounded_network(lego.deploy_(model, images[:1]), "lego")
    assert {"first.0.values", "second.1.values"} <= set(rounded.names)
    with torch.no_grad():
        expected = model(images)
        assert 0 < change(expected, rounded.hollow(images, rounded.tensors)) < 0.05


def test_a_layer_that_stays_in_fp32_is_not_rounded() -> None:
    model = lego.quantize_(small_network(), small_images())
    record: Any = lego.lego_state(model).quantization
    part = record.parts[""].model_copy(update={"float_layers": {"b": "a test"}})
    part = part.model_copy(update={"shifts": {k: v for k, v in part.shifts.items() if k != "b"}})
    lego.lego_state(model).quantization = record.model_copy(update={"parts": {"": part}})
    model = lego.quantize.requantize_(model)  # type: ignore[attr-defined]
    images = small_images(8, seed=3)
    rounded = build_rounded_network(model, "lego")
    assert "a.filters" in rounded.names
    assert not any(name.startswith("b.") for name in rounded.names)
    plain = [m for m in rounded.hollow.modules() if isinstance(m, PlainConv)]
    assert [layer.layer.name for layer in plain] == ["b"]
    with torch.no_grad():
        expected = model(images)
        assert 0 < change(expected, rounded.hollow(images, rounded.tensors)) < 0.05


def test_a_network_that_has_changed_is_refused(tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad():
        model.get_submodule("stem").weight.add_(0.01)  # type: ignore[operator, union-attr]
    with pytest.raises(QuantizationError, match=r"has changed since quantize_ \(stem.weight\)"):
        lego.export_onnx(model, tmp_path / "x.onnx", example_input=small_images(1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_files_hold_int8_and_runtimes_fold_them_to_int8_convs(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, images = tiny(), small_images(16, seed=3)
    with torch.no_grad():
        expected = model(images)
    folded = {}
    for form in FORMS:
        exported = lego.export_onnx(model, tmp_path / form, form, example_input=images)
        assert exported.relative_difference < 0.05
        stored = onnx.load(exported.path)
        large = [t for t in stored.graph.initializer if np.prod(t.dims) >= 128]
        assert {t.data_type for t in large} <= {
            onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT16,
        }  # fmt: skip
        names = {t.name for t in stored.graph.initializer}
        assert ("body.values" if form == "dense" else "body.filters") in names
        options = runtime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{form}.optimised")
        options.log_severity_level = 4
        providers = ["CPUExecutionProvider"]
        session = runtime.InferenceSession(str(exported.path), options, providers=providers)
        (output,) = session.run(None, {"image": images.numpy()})
        assert change(expected, torch.from_numpy(output)) < 0.08
        graph = onnx.load(options.optimized_model_filepath).graph
        folded[form] = Counter(node.op_type for node in graph.node)
    assert folded["assemble-at-load"] == folded["dense"]
    assert folded["dense"]["QLinearConv"] == 2
    assert folded["dense"]["Conv"] == 0
