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


def write_three_classes(folder: Path) -> list[Path]:
    """Write 30 test images of the classes 2, 5 and 9, and a map of all ten classes."""
    with np.load(SAMPLE) as file:
        pixels, labels = file["images"], file["labels"]
    for label in (2, 5, 9):
        # The order of the folders is not that of the classes.
        place = folder / "three" / f"{9 - label}-class"
        place.mkdir(parents=True)
        for position in np.flatnonzero(labels == label)[:10]:
            Image.fromarray(pixels[position]).save(place / f"{position}.png")
    class_map = folder / "classes.txt"
    class_map.write_text("".join(f"{9 - label}-class\n" for label in range(10)))
    return [folder / "three", class_map]


@pytest.mark.slow
def test_labelled_images_of_three_of_ten_classes(
    run: Run, tmp_path: Path, compressed_folder: Path
) -> None:
    labelled, class_map = write_three_classes(tmp_path)
    options = ["--images", 20, "--epochs", 0, "--labelled", labelled, "--class-map", class_map]
    ran = run("calibrate", compressed_folder, "--data", PHOTOS, "--out", "a", "--json", *options)
    assert (ran.code, ran.err) == (0, "")
    accuracies = [json.loads(ran.out)["accuracy"]]
    words = ["convert", DENSE, "--only", "layer1.*", "--calibrate", PHOTOS, "--out", "b", "--json"]
    ran = run(*words, *options)
    assert (ran.code, ran.err) == (0, "")
    accuracies.append(json.loads(ran.out)["calibration"]["accuracy"])
    for accuracy, folder in zip(accuracies, ("a", "b"), strict=True):
        assert accuracy["images"] == 30
        for name, network in (("original", DENSE), ("after", folder)):
            check = ["evaluate", network, "--data", labelled, "--class-map", class_map, "--json"]
            assert accuracy[name] == pytest.approx(json.loads(run(*check).out)["top1"])
        assert accuracy["original"] > 60


def test_options_of_a_calibration_need_one(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for option, value in {"--labelled": PHOTOS, "-b": 8, "--images": 20}.items():
        name = {"-b": "--batch-size"}.get(option, option)
        ran = run("convert", DENSE, "--out", out, option, value)
        check_error(ran, 2, f"{name} is an option of the calibration", "add --calibrate DATA")
    assert not out.exists()


def test_a_class_map_is_needed_for_three_of_ten_classes(
    run: Run, tmp_path: Path, compressed_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labelled, class_map = write_three_classes(tmp_path)
    monkeypatch.setattr(lego, "convert_", lambda *args: pytest.fail("converted before the check"))
    for words in (
        ["calibrate", compressed_folder, "--data", PHOTOS],
        ["convert", DENSE, "--calibrate", PHOTOS],
    ):
        ran = run(*words, "--out", tmp_path / "out", "--labelled", labelled)
        check_error(ran, 1, "3 class folders and the network 10 outputs", "give --class-map FILE")
        ran = run(*words, "--out", tmp_path / "out", "--class-map", class_map)
        check_error(ran, 2, "--class-map gives the order", "give --labelled DATA")
    assert {path.name for path in tmp_path.iterdir()} == {"three", "classes.txt"}


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
