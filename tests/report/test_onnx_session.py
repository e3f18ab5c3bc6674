"""ONNX files run as PyTorch does, and their cost is counted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from legocompress.errors import DataError, UsageError, WeightsError
from legocompress.report.onnx_session import OnnxNetwork
from tests.support.onnx_files import CHANNELS, CLASSES, classify, write_classifier

pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("batch", ["N", 1, 2])
def test_a_file_of_any_batch_size_computes_the_same(tmp_path: Path, batch: int | str) -> None:
    network = OnnxNetwork(write_classifier(tmp_path / "net.onnx", batch), threads=1)
    images = torch.randn(5, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(network(images), classify(images))
    assert network.image_size == (1, 16, 16)


@pytest.mark.parametrize("batch", ["N", 2])
def test_size_and_cost(tmp_path: Path, batch: int | str) -> None:
    path = write_classifier(tmp_path / "net.onnx", batch)
    network = OnnxNetwork(path, threads=1)
    assert network.count_bytes() == path.stat().st_size
    assert network.count_macs((1, 16, 16)) == 16 * 16 * CHANNELS * 9 + CHANNELS * CLASSES


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="there is no ONNX file"):
        OnnxNetwork(tmp_path / "none.onnx", 1)
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(WeightsError, match="cannot be read as an ONNX file"):
        OnnxNetwork(tmp_path / "broken.onnx", 1)


def test_images_of_another_size(tmp_path: Path) -> None:
    network = OnnxNetwork(write_classifier(tmp_path / "net.onnx"), threads=1)
    with pytest.raises(DataError, match=r"refuses images of shape \(1, 1, 8, 8\)"):
        network(torch.zeros(1, 1, 8, 8))


def test_without_the_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"legocompress\[onnx\]"):
        OnnxNetwork(tmp_path / "net.onnx", 1)
