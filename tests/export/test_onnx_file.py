"""The ONNX file: plain operators, as small as the checkpoint, equal in ONNX Runtime."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import legocompress as lego
from legocompress.errors import ExportError, OutputExistsError, UsageError
from legocompress.export import onnx_file, onnx_graph

pytestmark = pytest.mark.slow

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

IMAGE = torch.zeros(1, 3, 12, 12)


class Mixed(nn.Module):
    """Plain, grouped, padded, strided and doubly used convs, a norm and Linears; two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 45, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(45)
        self.padded = nn.Conv2d(45, 45, (3, 1), padding="same", bias=False)
        self.grouped = nn.Conv2d(45, 120, 3, padding=1, groups=5)
        self.hidden = nn.Linear(120, 48)
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.wide(self.stem(x))).relu()
        x = self.grouped(self.padded(self.padded(x).relu())).relu()
        return {"map": x, "logits": self.head(self.hidden(x.mean((2, 3))))}


def mixed(**settings: Any) -> nn.Module:
    model = Mixed().eval()
    nn.init.normal_(model.norm.running_mean)
    nn.init.uniform_(model.norm.weight, 0.5, 1.5)
    settings = {"m": 0.5, "o": 2, "linear": True, "allow_expansion": True, **settings}
    return lego.convert_(model, lego.plan(model, lego.LegoSpec(**settings), IMAGE))


def run(path: Path, x: Tensor, optimised: Path | None = None) -> list[Tensor]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["image"]
    return [torch.from_numpy(y) for y in session.run(None, {"image": x.numpy()})]


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.fixture(scope="module")
def int8() -> nn.Module:
    torch.manual_seed(0)
    return mixed(dtype="int8", k=2)


@pytest.fixture(scope="module")
def files(int8: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, lego.Exported]:
    place = tmp_path_factory.mktemp("onnx")
    forms: Any = onnx_file.FORMS
    return {
        form: lego.export_onnx(int8, place / f"{form}.onnx", form, example_input=IMAGE)
        for form in forms
    }


@pytest.mark.slow
@pytest.mark.parametrize("form", onnx_file.FORMS)
def test_every_form_gives_the_network_s_outputs(
    form: str, files: dict[str, lego.Exported], int8: nn.Module
) -> None:
    found = files[form]
    assert (found.form, found.bytes) == (form, found.path.stat().st_size)
    for batch in (1, 5):
        x = torch.randn(batch, 3, 12, 12)
        with torch.no_grad():
            expected = int8(x)
        outputs = run(found.path, x)
        assert len(outputs) == 2
        for ours, theirs in zip(expected.values(), outputs, strict=True):
            assert ours.std() > 1e-3
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", onnx_file.FORMS)
def test_a_file_holds_plain_operators_and_no_trace_of_its_making(
    form: str, files: dict[str, lego.Exported]
) -> None:
    proto = onnx.load(files[form].path)
    onnx.checker.check_model(proto, full_check=True)
    assert {domain.domain for domain in proto.opset_import} <= {"", "ai.onnx"}
    assert not proto.functions
    assert proto.producer_name == "legocompress"
    for node in proto.graph.node:
        assert not node.metadata_props
        assert not node.doc_string
    (image,) = proto.graph.input
    assert [d.dim_param or d.dim_value for d in image.type.tensor_type.shape.dim][1:] == [3, 12, 12]
    assert image.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_units_are_stored_as_in_the_checkpoint(files: dict[str, lego.Exported]) -> None:
    for form in ("lego", "assemble-at-load"):
        stored = {t.name: t for t in onnx.load(files[form].path).graph.initializer}
        bank = onnx.numpy_helper.to_array(stored["grouped.lego_filters.int8"])
        assert (bank.dtype, bank.shape) == (np.int8, (60, 5, 3, 3))
        index = onnx.numpy_helper.to_array(stored["grouped.index.uint8"])
        assert (index.dtype, index.shape) == (np.uint8, (2, 120, 2))
        gains = onnx.numpy_helper.to_array(stored["grouped.coefficients.float16"])
        assert (gains.dtype, gains.shape) == (np.float16, (2, 120, 2))
        assert stored["grouped.lego_scales.bfloat16"].data_type == onnx.TensorProto.BFLOAT16
    assert operators(files["lego"].path)["DequantizeLinear"] == 5
    assert operators(files["assemble-at-load"].path)["DequantizeLinear"] == 0


def test_the_runtime_folds_what_is_to_be_assembled(
    files: dict[str, lego.Exported], tmp_path: Path
) -> None:
    x = torch.randn(1, 3, 12, 12)
    for form in ("assemble-at-load", "dense", "lego"):
        run(files[form].path, x, tmp_path / form)
    folded = operators(tmp_path / "assemble-at-load")
    assert operators(files["assemble-at-load"].path)["Gather"] > 10
    assert "Gather" not in folded
    assert folded["Conv"] + folded["FusedConv"] == 5
    assert sum(folded.values()) <= sum(operators(tmp_path / "dense").values()) + 2
    merged = operators(tmp_path / "lego")
    assert merged["Gather"] > 10


def test_the_lego_file_is_at_most_a_twentieth_larger_than_the_checkpoint(tmp_path: Path) -> None:
    sizes = {"channels": [16, 16, 32, 64], "layers": [1, 1, 1, 1]}
    model = lego.create("resnet18", pretrained=False, num_classes=10, model_args=sizes)
    lego.convert_(model, lego.plan(model, lego.LegoSpec(m=0.5, o=2, dtype="fp16")))
    folder = lego.save(model, tmp_path / "folder")
    image = torch.zeros(1, 3, 32, 32)
    found = lego.export_onnx(model, tmp_path / "x.onnx", example_input=image)
    assert found.relative_difference < 1e-4
    stored = sum(path.stat().st_size for path in folder.iterdir())
    assert found.bytes <= 1.05 * stored


def test_what_goes_wrong_is_told(
    int8: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path: Any = tmp_path / "x.onnx"
    with pytest.raises(UsageError, match="unknown form 'fused'"):
        lego.export_onnx(int8, path, "fused", example_input=IMAGE)  # type: ignore[arg-type]
    (tmp_path / "there").write_text("precious")
    with pytest.raises(OutputExistsError, match="--force"):
        lego.export_onnx(int8, tmp_path / "there", example_input=IMAGE)
    monkeypatch.setattr(onnx_file, "MAX_BYTES", 1000)
    with pytest.raises(ExportError, match="one ONNX file holds"):
        lego.export_onnx(int8, path, "dense", example_input=IMAGE)

    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UsageError, match=r"legocompress\[onnx\]"):
        lego.export_onnx(int8, path, example_input=IMAGE)
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_a_file_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3))
    spec = lego.LegoSpec(m=0.5, o=2, allow_expansion=True)
    lego.convert_(model, lego.plan(model, spec, IMAGE))
    attach = onnx_graph.attach_unit_

    def shifted(onnx: Any, proto: Any, name: str, unit: Any, form: Any) -> None:
        unit.index.add_(1).remainder_(2)
        attach(onnx, proto, name, unit, form)

    monkeypatch.setattr(onnx_file, "attach_unit_", shifted)
    with pytest.raises(ExportError, match=r"ONNX Runtime differs .* nothing was written"):
        lego.export_onnx(model, tmp_path / "x.onnx", example_input=IMAGE)
    assert not list(tmp_path.iterdir())
