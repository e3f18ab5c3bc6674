"""`--html` on the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

import legocompress as lego
from tests.support.command_line import ALL, DENSE, SAMPLE, SMALL, Run, check_error
from tests.support.pages import read_page
from tests.support.tiny import compressed, recipe, write_images


@pytest.mark.slow
def test_report_writes_a_page_beside_its_output(
    run: Run, tmp_path: Path, compressed_folder: Path
) -> None:
    with np.load(SAMPLE) as sample:
        np.savez(tmp_path / "few.npz", images=sample["images"][:12])
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"garment {number}" for number in range(10)))
    options = ["--html", "page.html", "--data", "few.npz", "--class-map", names]
    ran = run("report", compressed_folder, *options, "--original", DENSE)
    assert (ran.code, ran.err) == (0, "")
    assert "theoretical speedup" in ran.out
    text = read_page(tmp_path / "page.html").text
    stored = lego.measure(lego.load(compressed_folder), path=compressed_folder).stored_bytes
    assert stored is not None
    assert f"{stored / 1e3:.2f} kB on disk" in text
    assert "garment 3" in text
    assert "saw the same 12 photos." in text
    assert "Original and assembled filters" in text
    check_error(run("report", compressed_folder, "--html", "page.html"), 2, "--html", "--force")
    assert run("report", compressed_folder, "--html", "page.html", "--force").code == 0
    assert "disagree" not in read_page(tmp_path / "page.html").text


def test_options_of_the_page_alone_are_refused(run: Run, compressed_folder: Path) -> None:
    check_error(run("report", compressed_folder, "--data", SAMPLE), 2, "--html FILE")
    check_error(
        run("report", compressed_folder, "--html", "p.html", "--class-map", "none"), 1, "'none'"
    )
    check_error(run("convert", *SMALL, "--dry-run", "--html", "p.html"), 2, "--dry-run")
    check_error(run("convert", *SMALL, "--out", "same", "--html", "same"), 2, "--out")
    Path("p.html").write_text("mine")
    check_error(run("convert", *SMALL, "--out", "new", "--html", "p.html"), 2, "--force")
    assert Path("p.html").read_text() == "mine"
    assert not Path("new").exists()


def test_convert_shows_original_filters(run: Run) -> None:
    ran = run("convert", *SMALL, ALL, "--out", "new", "--html", "page.html")
    assert (ran.code, ran.err) == (0, "")
    assert f"page.html: {Path('page.html').stat().st_size:,} bytes" in ran.out
    text = read_page(Path("page.html")).text
    assert "the first converted layer, weight error" in text
    assert "disagree" not in text


OPTIONS = ["--images", 12, "--epochs", 0, "--html", "page.html"]


@pytest.mark.slow
def test_a_calibration_compares_on_its_photos(
    run: Run, tmp_path: Path, compressed_folder: Path
) -> None:
    with np.load(SAMPLE) as sample:
        np.savez(tmp_path / "few.npz", images=sample["images"][:12])
    command = ["calibrate", compressed_folder, "--data", "few.npz", "--original", DENSE]
    ran = run(*command, *OPTIONS, "--out", "new")
    assert (ran.code, ran.err) == (0, "")
    text = read_page(Path("page.html")).text
    assert "saw the same 12 photos, which calibration has used." in text
    assert "photos that calibration held out" in text
    assert "Error of the outputs, before and after calibration" in text


@pytest.mark.slow
def test_a_calibration_compares_on_labelled_photos(run: Run, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "few.npz", images=pixels, labels=np.arange(12) % 4)
    ran = run("convert", *SMALL, ALL, "--calibrate", "few.npz", *OPTIONS, "--labelled", "few.npz")
    assert (ran.code, ran.err) == (0, "")
    text = read_page(Path("page.html")).text
    assert "saw the same 12 photos." in text
    assert "12 labelled images (original" in text


@pytest.mark.slow
def test_fine_tuning_shows_its_curves_and_report_finds_them(run: Run, tmp_path: Path) -> None:
    lego.save(compressed(), "net")
    write_images(tmp_path / "images.npz")
    Path("r.yaml").write_text(yaml.safe_dump(recipe().model_dump(mode="json")))
    command = ["finetune", "net", "--recipe", "r.yaml", "--data-dir", "images.npz"]
    assert run(*command, "--html", "page.html").code == 0
    text = read_page(tmp_path / "page.html").text
    assert "Fine-tuning, 2 epochs" in text
    assert "Training loss" in text
    assert "Recipe of the fine-tuning" in text
    assert run("report", "net-ft/last", "--html", "last.html").code == 0
    assert "Fine-tuning, 2 epochs" in read_page(tmp_path / "last.html").text
    assert run(*command, "--html", "page.html", "--resume").code == 0
