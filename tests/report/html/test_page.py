"""The page: what it holds, that it is inert, small and whole."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import legocompress as lego
from legocompress.errors import OutputError, OutputExistsError, UsageError
from legocompress.report.html import MAX_PAGE_BYTES, page
from legocompress.state.calibration import Calibration, LabelledCheck, LayerRepair
from legocompress.state.source import Source
from tests.support.pages import PageParser, make_pair, read_page

HOSTILE = """</title></svg><script>alert(1)</script><img src=x onerror='a'>"`javascript:x{{7*7}}"""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


def calibration(names: list[str], note: str = "note") -> Calibration:
    layers = [LayerRepair(name=name, before=0.5, after=0.25, note=note) for name in names]
    return Calibration(
        images=40, sha256="0", synthetic=False, seed=3, epochs=2, norms=True, error_before=0.75,
        error_after=0.375, agreement_before=50.0, agreement_after=87.5, layers=layers,
        accuracy=LabelledCheck(images=9, original=77.5, before=11.5, after=66.5),
    )  # fmt: skip


def run_folder(path: Path, extra: str = "note") -> Path:
    path.mkdir()
    (path / "summary.csv").write_text(
        f"epoch,train_loss,train_top1,eval_top1,eval_agreement,lr,{extra}\n"
        "0,2.5,,10.5,20,0.1,x\n1,1.25,,30.25,,0.01,y\n"
    )
    return path


def photos(model: Any, path: Path) -> Any:
    """Twenty noisy images as a data set for a network of 8x8 images."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    np.savez(path, images=pixels)
    model.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    return lego.open_images(str(path), model)


def write_everything(tmp_path: Path, text: str) -> tuple[PageParser, lego.Report]:
    """Write a page with all sections, with `text` wherever a file or a user gives one."""
    original, model, report = make_pair(f"layer{text}".replace(".", ""))
    rows = tuple(replace(r, reason=r.reason and f"reason {text}") for r in report.rows)
    report = replace(report, rows=rows, note=f"note {text}", stored_bytes=54321)
    state = lego.lego_state(model)
    state.source = Source(None, f"arch {text}", {}, f"weights {text}")
    assert state.conversion is not None
    state.conversion = replace(state.conversion, recipe={f"key {text}": [f"value {text}"]})
    state.calibration = calibration([row.name for row in report.rows], f"note {text}")
    sources = lego.ReportSources(
        original,
        photos(model, tmp_path / "photos.npz"),
        class_names=[f"class {number} {text}" for number in range(6)],
        run_folder=run_folder(tmp_path / "run", re.sub(r"[\s,]", "", text)),
        sensitivity={row.name: 0.5 for row in report.rows},
    )
    path = lego.write_html_report(model, tmp_path / "page.html", report, sources)
    return read_page(path), report


def test_the_page_shows_what_was_measured(tmp_path: Path) -> None:
    parsed, report = write_everything(tmp_path, "x")
    text = parsed.text
    assert parsed.open_tags == []
    assert f"{report.total('dense_bits') / 8 / 54321:.1f}× smaller" in text
    assert f"{report.speedup:.1f}× less" in text
    assert "54.32 kB on disk" in text
    agreement = re.search(r"gave the same first answer on ([\d.]+) %", text)
    assert agreement is not None
    assert f"original network on {agreement[1]} % of 20 photos" in text
    assert all(row.name in text for row in report.rows if row.weight_shape)
    for row in report.rows:
        if row.weight_error is not None:
            assert f"Error of the weights: {row.weight_error:.3f}" in text
    assert "0.500→0.250" in text
    assert "0.750 0.375" in text
    assert "50.0 % 87.5 %" in text
    assert "Fine-tuning, 2 epochs" in text
    assert "first 2.5 last 1.25" in text
    assert "first 20 last 20" in text  # the empty cell is left out
    assert "Sensitivity: 0.500" in text
    assert "m: 0.5" in text
    assert f"legocompress {lego.__version__}" in text
    assert "key x: - value x" in text
    images = [address for address in parsed.addresses if address.startswith("data:image/")]
    # Two layers' Lego filters, three pictures of each of two layers, eight photos.
    assert len(images) == 2 + 6 + 8
    assert {a for a in parsed.addresses if not a.startswith("data:image/")} == {"#layers"}


def test_a_page_without_further_sources(tmp_path: Path) -> None:
    _, model, report = make_pair()
    path = lego.write_html_report(model, tmp_path / "page.html", report)
    text = read_page(path).text
    assert text.count("not measured") == 2
    assert "disagree" not in text
    assert "Calibration" not in text
    assert "Fine-tuning" not in text
    assert path.read_bytes() == lego.write_html_report(model, path, report, force=True).read_bytes()


def test_measured_times_are_shown_with_their_conditions(tmp_path: Path) -> None:
    original, model, _ = make_pair()
    report = lego.measure(model, original, torch.zeros(1, 3, 8, 8), repeats=2)
    path = lego.write_html_report(model, tmp_path / "page.html", report)
    text = read_page(path).text
    fastest = max(report.latency[1:], key=lambda one: one.ratio)
    assert f"{fastest.ratio:.2f}× " in text
    assert f"form “{fastest.form}”, cpu, 1 thread, batch 1" in text
    assert text.count("2 interleaved runs, cpu, 1 thread, batch 1, float32") == 3


def test_hostile_names_are_inert(tmp_path: Path) -> None:
    for name in ("harmless", "hostile"):
        (tmp_path / name).mkdir()
    harmless, _ = write_everything(tmp_path / "harmless", "x")
    hostile, _ = write_everything(tmp_path / "hostile", HOSTILE)
    assert hostile.tags == harmless.tags
    assert hostile.open_tags == []
    assert len(hostile.addresses) == len(harmless.addresses)
    for parsed in (harmless, hostile):
        assert "script" not in {tag for tag, _ in parsed.tags}
        attributes = {attribute for _, attributes in parsed.tags for attribute in attributes}
        assert not any(attribute.startswith("on") for attribute in attributes)
        assert all(re.match("data:image/(png|jpeg);base64,|#layers$", a) for a in parsed.addresses)
    for place in ("arch", "weights", "note", "reason", "class", "layer", "key", "value"):
        assert re.search(rf"{place} ?\d? ?{re.escape(HOSTILE[:20])}", hostile.text), place


def test_no_template_marks_anything_as_safe() -> None:
    folder = Path(page.__file__).parent
    for file in [*folder.glob("*.py"), *folder.glob("templates/*")]:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"\|\s*safe|Markup|autoescape\s*(=\s*F|f)|https?:", text), file.name


def test_very_long_texts_are_cut(tmp_path: Path) -> None:
    _, model, report = make_pair()
    lego.lego_state(model).source = Source(None, "a" * 10**6, {}, "w" * 10**6)
    rows = tuple(replace(row, reason=row.reason and "r" * 10**6) for row in report.rows)
    report = replace(report, rows=rows, note="n" * 10**6)
    path = lego.write_html_report(model, tmp_path / "page.html", report)
    assert path.stat().st_size < 50_000


def test_pictures_give_way_to_the_limit_of_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model, report = make_pair()
    whole = lego.write_html_report(model, tmp_path / "whole.html", report).stat().st_size
    assert whole < 40_000 < MAX_PAGE_BYTES
    monkeypatch.setattr(page, "MAX_PAGE_BYTES", whole - 1)
    path = lego.write_html_report(model, tmp_path / "less.html", report)
    assert path.stat().st_size < whole
    assert "no room left for a picture" in read_page(path).text
    monkeypatch.setattr(page, "MAX_PAGE_BYTES", 5000)
    with pytest.raises(OutputError, match="over the limit of 5,000"):
        lego.write_html_report(model, tmp_path / "none.html", report)
    assert {file.name for file in tmp_path.iterdir()} == {"whole.html", "less.html"}


def test_thousands_of_layers_fit(tmp_path: Path) -> None:
    _, model, report = make_pair()
    rows = tuple(replace(report.rows[1], name=f"stages.{n}.blocks.conv") for n in range(3000))
    path = lego.write_html_report(model, tmp_path / "page.html", replace(report, rows=rows))
    assert path.stat().st_size < MAX_PAGE_BYTES
    assert "1500 more layers are left out" in read_page(path).text


def test_an_existing_page_and_a_wrong_original_are_refused(tmp_path: Path) -> None:
    _, model, report = make_pair()
    target = tmp_path / "page.html"
    target.write_text("mine")
    with pytest.raises(OutputExistsError):
        lego.write_html_report(model, target, report)
    assert target.read_text() == "mine"
    other, _, _ = make_pair("other")
    with pytest.raises(UsageError, match="'layer1' has no weight"):
        lego.write_html_report(model, target, report, lego.ReportSources(other), force=True)
    assert target.read_text() == "mine"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
def test_a_browser_shows_the_page_without_an_error(tmp_path: Path) -> None:
    write_everything(tmp_path, HOSTILE)
    shot = tmp_path / "shot.png"
    assert CHROMIUM is not None
    ran = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,1600",
            f"--screenshot={shot}", "--dump-dom", (tmp_path / "page.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in ran.stderr
    shown = PageParser(ran.stdout)
    assert shown.tags == read_page(tmp_path / "page.html").tags
    assert "made of Lego filters" in shown.text
    colours = np.asarray(Image.open(shot).convert("RGB")).reshape(-1, 3)
    assert colours.shape == (1600 * 1000, 3)
    assert len(np.unique(colours, axis=0)) > 100
