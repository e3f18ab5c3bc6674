"""`analyze`, and budgets of `convert --calibrate`, on the command line."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

import legocompress as lego
from tests.support.command_line import DENSE, PHOTOS, Run, check_error

FEW = ["--only", "layer3.0.*"]


@pytest.mark.slow
def test_analyze_prints_layers_and_rules_that_convert_takes(run: Run, tmp_path: Path) -> None:
    words = ["analyze", DENSE, "--data", PHOTOS, "--images", 20, *FEW]
    printed = json.loads(run(*words, "--json").out)
    assert printed["images"] == 20
    found = lego.Sensitivity.model_validate_json(
        json.dumps({key: value for key, value in printed.items() if key != "spec"})
    )
    assert printed["spec"] is None
    ran = run(*words, "--max-size", 0.9, "--journal", tmp_path / "journal")
    assert (ran.code, ran.err) == (0, "")
    assert not (tmp_path / "journal").exists()
    rows = re.findall(
        r"^ *(layer3\S+) .* (\d\.\d{4}) +(\d\.\d{4}) +([\d.]+) %", ran.out, re.MULTILINE
    )
    assert {row[0] for row in rows} == {layer.name for layer in found.layers}
    for name, estimated, measured, agreement in rows:
        layer = found.by_name[name]
        assert float(estimated) == pytest.approx(layer.forms[0].loss, abs=1e-4)
        assert float(measured) == pytest.approx(layer.measured_loss, abs=1e-4)
        assert float(agreement) == pytest.approx(layer.agreement, abs=0.1)
    options = shlex.split(ran.out.partition("convert`:\n\n")[2].replace("\\\n", " "))
    given = [option.partition(":")[0] for option in options if not option.startswith("--")]
    assert set(given) == {layer.name for layer in found.layers}
    ran = run("convert", DENSE, *FEW, *options, "--out", tmp_path / "out")
    assert (ran.code, ran.err) == (0, "")
    totals = lego.measure(lego.load(tmp_path / "out")).totals()
    assert totals["bits"] <= 0.9 * totals["dense_bits"]


@pytest.mark.slow
def test_convert_spends_a_budget_by_the_photos(run: Run, tmp_path: Path) -> None:
    words = ["convert", DENSE, *FEW, "--max-size", 0.9, "--epochs", 0, "--calibrate", PHOTOS,
             "--spend-by", "images"]  # fmt: skip
    ran = run(*words, "--images", 36, "--out", tmp_path / "out")
    assert (ran.code, ran.err.splitlines()[1:]) == (0, [])  # one line advises crops
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert re.search(r"KL expected .*: [\d.]+; measured, .*: [\d.]+", ran.out)
    ran = run(*words, "--images", 12, "--dry-run")
    assert "errors of the weights" in ran.err


def test_analyze_refuses_what_cannot_be_measured(run: Run, compressed_folder: Path) -> None:
    ran = run("analyze", compressed_folder, "--data", PHOTOS)
    check_error(ran, 2, "compressed already", "original network")
    words = ["analyze", DENSE, "--data", PHOTOS, "--max-macs", 0.9, "--rule", "layer1.*:m=0.5"]
    check_error(run(*words), 2, "sets m or o")  # before anything is measured
    check_error(run("convert", DENSE, "--spend-by", "images"), 2, "--max-macs", "--calibrate")
    check_error(run("analyze", DENSE, "--data", "nowhere"), 1, "no images at 'nowhere'")
