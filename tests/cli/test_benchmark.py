"""`benchmark` on the command line: what it prints, saves and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from legocompress_cli.main import cli

import legocompress as lego
from legocompress.errors import CheckpointError, UsageError
from legocompress.report import rivals


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(rivals, "COMPILE_SECONDS", 0)
    args = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}
    model = lego.create("resnet18", pretrained=False, num_classes=10, model_args=args)
    spec = lego.LegoSpec(m=0.5, o=2, allow_expansion=True)
    lego.convert_(model, lego.plan(model, spec, torch.zeros(1, 3, 32, 32)))
    return lego.save(model, tmp_path / "small")


def run(*words: object) -> Result:
    result = CliRunner().invoke(cli, ["benchmark", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.slow
def test_tables_and_saved_choices(folder: Path) -> None:
    ran = run(folder, "--batch", 1, 2, "--threads", 1, "--against", "dense", "torchvision",
              "--img-size", 32, "--rounds", 2, "--layers", "--save")  # fmt: skip
    assert ran.exit_code == 0, ran.output
    for text in ("batch 1, 1 thread,", "batch 2, 1 thread,", "2x3x32x32", "deployed dense",
                 "left out: torch.compile: no time was given", "layer1.0.conv1", "theory",
                 "the speed of the strongest dense form", "keeps these routes"):  # fmt: skip
        assert text in ran.output, text
    shapes = [hint.machine.input_shapes[0] for hint in lego.lego_state(lego.load(folder)).choices]
    assert shapes == [(1, 3, 32, 32), (2, 3, 32, 32)]


@pytest.mark.slow
def test_json_holds_what_the_library_measures(folder: Path) -> None:
    before = (folder / "config.json").read_bytes()
    ran = run(
        "--against", "dense", "--img-size", 32, "--rounds", 2, "--threads", 1, folder, "--json"
    )
    (printed,) = json.loads(ran.output)
    assert printed["ratio"] == printed["forms"][0]["ratio"]
    assert printed["forms"][0]["form"] == "lego"
    assert printed["strongest"] in [form["form"] for form in printed["forms"][1:]]
    assert len(printed["layers"]) == len(list(lego.lego_modules(lego.load(folder))))
    assert (folder / "config.json").read_bytes() == before


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a compressed folder"):
        run(tmp_path)
    with pytest.raises(UsageError, match="cores"):
        run(folder, "--threads", 100_000)
    for words in (["--batch", 0], ["--batch", "x"], ["--against", "tensorrt"], ["--rounds", 1]):
        ran = run(folder, *words)
        assert ran.exit_code == 2
        assert "Invalid value" in ran.output or "Got unexpected" in ran.output
