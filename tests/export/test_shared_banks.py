"""Exports of layers that share a bank hold it once; they and deployed networks compute the same."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import legocompress as lego

pytestmark = pytest.mark.slow

IMAGE = torch.zeros(1, 3, 8, 8)


def shared(dtype: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), *(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3)))
    spec = lego.LegoSpec(m=2, o=2, k=2, dtype=dtype, share="network", allow_expansion=True)
    model.append(nn.Flatten())
    return lego.convert_(model, lego.plan(model.eval(), spec, IMAGE))


@pytest.mark.parametrize("form", ["lego", "assemble-at-load", "dense"])
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_onnx_files_hold_a_shared_bank_once(dtype: str, form: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = shared(dtype)
    written = lego.export_onnx(model, tmp_path / "x.onnx", form, example_input=IMAGE)
    assert written.relative_difference < 1e-5
    stored = [tensor.name for tensor in onnx.load(tmp_path / "x.onnx").graph.initializer]
    banks = [name for name in stored if "lego_filters" in name]
    assert len(banks) == (0 if form == "dense" else 1)


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_programs_hold_a_shared_bank_once(dtype: str, tmp_path: Path) -> None:
    model = shared(dtype)
    written = lego.export_program(model, tmp_path / "x.pt2", "lego", example_input=IMAGE)
    assert written.relative_difference < 1e-5
    program = torch.export.load(tmp_path / "x.pt2")
    shape = next(iter(lego.lego_modules(model)))[1].lego_filters.shape
    assert sum(value.shape == shape for value in program.state_dict.values()) == 1


def test_a_deployed_network_computes_the_same() -> None:
    model = shared("fp32")
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
        deployed = copy.deepcopy(model)
        lego.deploy_(deployed, x)
        torch.testing.assert_close(deployed(x), expected, rtol=1e-4, atol=1e-5)
