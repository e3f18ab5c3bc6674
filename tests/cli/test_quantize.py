"""`quantize` and `convert --precision` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import legocompress as lego
from tests.support.calibrating import demo_images
from tests.support.command_line import DENSE, PHOTOS, Run, check_error


@pytest.mark.slow
def test_a_compressed_folder_is_quantised_and_reported(
    run: Run, tmp_path: Path, compressed_folder: Path
) -> None:
    words = ["quantize", compressed_folder, "--data", PHOTOS, "--images", 10]
    ran = run(*words, "--out", tmp_path / "out", "--json")
    assert (ran.code, ran.err) == (0, "")
    printed = json.loads(ran.out)
    model = lego.load(tmp_path / "out")
    record = lego.lego_state(model).quantization
    assert record is not None
    assert (printed["precision"], printed["images"]) == ("int8", 10)
    assert (printed["error"], printed["float_layers"]) == (record.error, {})
    original = lego.load(compressed_folder)
    images = demo_images(12)
    with torch.no_grad():
        expected, actual = original(images), model(images)
    assert 0 < float((expected - actual).norm() / expected.norm()) < 0.1
    reported = json.loads(run("report", tmp_path / "out", "--json").out)["quantization"]
    assert reported["method"] == record.method
    text = run("report", tmp_path / "out").out
    assert f"precision int8: ranges by {record.method} on 10 images" in text
    check_error(run(*words, "--out", tmp_path / "out"), 2, "exists")
    check_error(
        run("quantize", tmp_path / "out", "--data", PHOTOS, "--out", "b"), 1, "quantised already"
    )


@pytest.mark.slow
def test_convert_calibrates_and_quantises(run: Run, tmp_path: Path) -> None:
    words = ["convert", DENSE, "--only", "layer1.*", "--calibrate", PHOTOS, "--images", 10]
    ran = run(*words, "--epochs", 0, "--precision", "int8", "--out", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    printed = json.loads(ran.out)
    assert printed["quantization"]["precision"] == "int8"
    assert lego.lego_state(lego.load(tmp_path / "out")).quantization is not None


def test_wrong_words_are_refused_before_anything_is_read(run: Run, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    words = ["quantize", nowhere, "--data", nowhere]
    check_error(run(*words, "--precision", "int4"), 2, "there is int8")
    check_error(run("convert", nowhere, "--precision", "int8"), 2, "give --calibrate PHOTOS")
    synthetic = ["--calibrate", "synthetic", "--precision", "int8"]
    check_error(run("convert", nowhere, *synthetic), 2, "give --calibrate PHOTOS")


@pytest.mark.slow
def test_unfit_photos_are_refused(run: Run, tmp_path: Path, compressed_folder: Path) -> None:
    for name, images, words in (
        ("few", np.random.default_rng(0).integers(0, 255, (4, 28, 28)), "4 images are too few"),
        ("constant", np.full((12, 28, 28), 7), "all pixels"),
    ):
        np.savez(tmp_path / f"{name}.npz", images=images.astype(np.uint8))
        ran = run("quantize", compressed_folder, "--data", tmp_path / f"{name}.npz", "--out", "x")
        check_error(ran, 1, words)
    assert not (tmp_path / "x").exists()
