"""`evaluate` on the command line."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

import legocompress as lego
from tests.support.command_line import DEMO, DENSE, SAMPLE, Run, check_error


@pytest.mark.slow
def test_evaluate_prints_what_the_library_measures(run: Run, compressed_folder: Path) -> None:
    ran = run(
        "evaluate", compressed_folder, "--data", SAMPLE, "--original", DENSE, "-b", 250, "--json"
    )
    assert (ran.code, ran.err) == (0, "")
    model, dense = lego.load(compressed_folder), lego.create(DENSE)
    expected = lego.evaluate(model, lego.open_images(SAMPLE, model).batches(250), dense)
    printed = json.loads(ran.out)
    assert printed == pytest.approx(asdict(expected))
    assert printed["images"] == 1000
    assert 85 < printed["original_top1"] < 97
    weights = DEMO / "fashion-resnet" / "model.safetensors"
    again = run("evaluate", compressed_folder, "--data", SAMPLE, "--original-weights", weights)
    assert f"agreement    {expected.agreement:.2f} %" in again.out
    assert f"(original {expected.original_top1:.2f} %)" in again.out
    assert f"logit error  {expected.logit_error:.4f}" in again.out
    assert f"divergence   {expected.divergence:.4f}" in again.out


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images(run: Run, tmp_path: Path, compressed_folder: Path, workers: int) -> None:
    check_error(
        run("evaluate", compressed_folder, "--data", "nowhere", "-j", workers), 1, "no images at"
    )
    check_error(
        run("evaluate", compressed_folder, "--data", "no/x.npz", "-j", workers), 1, "no/x.npz"
    )
    (tmp_path / "pictures").mkdir()
    check_error(
        run("evaluate", compressed_folder, "--data", "pictures", "-j", workers),
        1,
        "holds no images",
    )
    Image.new("L", (60, 60)).save(tmp_path / "pictures" / "a.png")
    check_error(
        run("evaluate", compressed_folder, "--data", "pictures"), 2, "has no labels", "--original"
    )
    (tmp_path / "pictures" / "b.png").write_bytes(b"\x89PNG\r\n\x1a\nxx")
    ran = run(
        "evaluate",
        compressed_folder,
        "--data",
        "pictures",
        "--original",
        DENSE,
        "-j",
        workers,
        "-b",
        1,
    )
    check_error(ran, 1, "b.png' cannot be read")


def test_originals_that_do_not_fit(run: Run, compressed_folder: Path) -> None:
    ran = run("evaluate", compressed_folder, "--data", SAMPLE, "--original", "no_such_network")
    check_error(ran, 2, "no_such_network")
    ran = run("evaluate", compressed_folder, "--data", SAMPLE, "--original-weights", "nowhere")
    check_error(ran, 1, "does not exist")


def test_options_of_a_model_are_not_ignored_for_a_folder(run: Run, compressed_folder: Path) -> None:
    ran = run("evaluate", compressed_folder, "--data", SAMPLE, "--num-classes", 3)
    check_error(ran, 2, "num_classes")


@pytest.mark.slow
def test_the_image_size_alone_can_be_given_for_a_grey_network(run: Run) -> None:
    ran = run("evaluate", DENSE, "--data", SAMPLE, "--img-size", 56, "--json")
    assert (ran.code, ran.err) == (0, "")
    plain = run("evaluate", DENSE, "--data", SAMPLE, "--json")
    assert json.loads(ran.out) == json.loads(plain.out)
