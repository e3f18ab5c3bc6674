"""`calibrate` and `convert --calibrate` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import legocompress as lego
from tests.support.command_line import DEMO, DENSE, PHOTOS, SAMPLE, Run, check_error


@pytest.mark.slow
def test_calibration_repairs_and_is_reported(
    run: Run, tmp_path: Path, compressed_folder: Path
) -> None:
    options = ["--data", PHOTOS, "--images", 60, "--epochs", 1]
    ran = run("calibrate", compressed_folder, "--out", tmp_path / "out", *options)
    assert (ran.code, ran.err) == (0, "")
    assert "layer1.0.conv1" in ran.out
    assert {path.name for path in tmp_path.iterdir()} == {"out"}  # no journal is left
    record = lego.lego_state(lego.load(tmp_path / "out")).calibration
    assert isinstance(record, lego.Calibration)
    assert (record.images, record.synthetic) == (60, False)
    assert record.error_after < record.error_before
    printed = json.loads(run("report", tmp_path / "out", "--json").out)
    assert printed["calibration"] == record.model_dump()
    assert "calibrated with 60 unlabelled images" in run("report", tmp_path / "out").out
    assert json.loads(run("report", compressed_folder, "--json").out)["calibration"] is None


@pytest.mark.slow
def test_calibration_measures_accuracy_on_labelled_images(
    run: Run, tmp_path: Path, compressed_folder: Path
) -> None:
    words = ["calibrate", compressed_folder, "--data", PHOTOS, "--images", 60, "--epochs", 1]
    ran = run(*words, "--labelled", SAMPLE, "--out", tmp_path / "out", "--json")
    assert (ran.code, ran.err) == (0, "")
    accuracy = json.loads(ran.out)["accuracy"]
    record = lego.lego_state(lego.load(tmp_path / "out")).calibration
    assert record.accuracy.model_dump() == accuracy
    for folder, key in ((compressed_folder, "before"), (tmp_path / "out", "after")):
        evaluation = json.loads(run("evaluate", folder, "--data", SAMPLE, "--json").out)
        assert evaluation["images"] == accuracy["images"]
        assert evaluation["top1"] == pytest.approx(accuracy[key])
    assert accuracy["before"] < accuracy["after"] < accuracy["original"]
    assert f"-> {accuracy['after']:>8.1f} %   (original" in run("report", tmp_path / "out").out
    check_error(run(*words, "--labelled", PHOTOS, "--out", tmp_path / "other"), 2, "no labels")


@pytest.mark.slow
def test_convert_can_calibrate(run: Run, tmp_path: Path) -> None:
    words = ["convert", DENSE, "--images", 20, "--epochs", 0, "--only", "layer1.*", "--json"]
    records = {}
    for name in (PHOTOS, "synthetic"):
        ran = run(*words, "--calibrate", name, "--out", tmp_path / Path(name).stem)
        assert (ran.code, ran.err) == (0, "")
        records[name] = json.loads(ran.out)["calibration"]
        assert records[name]["error_after"] < records[name]["error_before"]
    assert [records[name]["synthetic"] for name in records] == [False, True]
    # Each is calibrated on images of its own kind.
    assert records[PHOTOS]["sha256"] != records["synthetic"]["sha256"]


@pytest.mark.slow
def test_crops_of_few_photos(run: Run, tmp_path: Path, compressed_folder: Path) -> None:
    with np.load(PHOTOS) as file:
        np.savez(tmp_path / "few.npz", images=file["images"][:12])
    words = ["calibrate", compressed_folder, "--data", tmp_path / "few.npz", "--epochs", 0, "--out"]
    ran = run(*words, tmp_path / "whole")
    assert ran.code == 0
    assert "12 images are few: --crops 22 would take" in ran.err
    ran = run(*words, tmp_path / "parts", "--crops", 3)
    assert (ran.code, ran.err) == (0, "")
    record = lego.lego_state(lego.load(tmp_path / "parts")).calibration
    assert (record.images, record.crops) == (36, 3)
    summary = "calibrated with 36 unlabelled images (3 random crops of each photo)"
    assert summary in run("report", tmp_path / "parts").out
    words[3] = "synthetic"
    check_error(run(*words, tmp_path / "other", "--crops", 3), 2, "--crops takes parts of photos")


@pytest.mark.slow
def test_calibration_needs_an_original_and_images(
    run: Run, tmp_path: Path, compressed_folder: Path
) -> None:
    words = ["calibrate", compressed_folder, "--out", tmp_path / "out"]
    check_error(run(*words, "--data", tmp_path / "nowhere", "--original", DENSE), 1, "no images at")
    model = lego.create(DENSE, weights=DEMO / "fashion-resnet" / "model.safetensors")
    lego.convert_(model, lego.plan(model))
    lego.save(model, tmp_path / "by-file")
    check_error(run("calibrate", tmp_path / "by-file", "--data", PHOTOS), 2, "--original-weights")
    few = tmp_path / "few"
    few.mkdir()
    Image.new("L", (28, 28)).save(few / "one.png")
    check_error(run(*words, "--data", few, "--original", DENSE), 1, "1 images are too few")
    assert {path.name for path in tmp_path.iterdir()} == {"few", "by-file"}
