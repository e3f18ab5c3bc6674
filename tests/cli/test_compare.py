"""`compare` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import legocompress as lego
from tests.support.command_line import Run, check_error
from tests.support.onnx_files import write_classifier
from tests.support.tiny import compressed, write_images


@pytest.fixture(autouse=True)
def networks(run: Run) -> None:
    """Two compressed folders and an ONNX file, in the folder where the command runs."""
    lego.save(compressed(), "a")
    lego.save(compressed(m=0.25, o=4), "b")


@pytest.mark.slow
def test_folders_and_an_onnx_file(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    write_classifier(tmp_path / "net.onnx")
    write_images(tmp_path / "images.npz", 12)
    ran = run("compare", "a", "b", "net.onnx", "--labelled", "images.npz", "--data", "images.npz",
              "--rounds", 2, "--threads", 1, "--json")  # fmt: skip
    assert (ran.code, ran.err) == (0, "")
    first, second, third = json.loads(ran.out)["rows"]
    assert first["agreement"] == 100
    assert first["n_bytes"] > second["n_bytes"]
    assert third["macs"] == 16 * 16 * 4 * 9 + 12
    images = lego.open_images("images.npz", lego.load("a"))
    assert first["top1"] == pytest.approx(lego.evaluate(lego.load("a"), images.batches(8)).top1)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["a"], 2, "two networks or more"),
        (["a", "b", "--class-map", "x"], 2, "--labelled"),
        (["a", "none.onnx"], 1, "there is no ONNX file 'none.onnx'"),
        (["a", "resnett18"], 2, "unknown model 'resnett18'"),
    ],
)
def test_every_fault_is_one_sentence(run: Run, words: list[str], code: int, message: str) -> None:
    check_error(run("compare", *words), code, message)
