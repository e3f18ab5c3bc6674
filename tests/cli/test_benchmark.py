"""`benchmark` on the command line: what it prints, saves and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from legocompress_cli.main import cli

import legocompress as lego
from legocompress.errors import CheckpointError, DataError, UsageError
from legocompress.report.rivals import table, torch_forms


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch_forms, "COMPILE_SECONDS", 0)
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
                 "the speed of the fastest dense form in fp32", "keeps these routes"):  # fmt: skip
        assert text in ran.output, text
    shapes = [hint.machine.input_shapes[0] for hint in lego.lego_state(lego.load(folder)).choices]
    assert shapes == [(1, 3, 32, 32), (2, 3, 32, 32)]


@pytest.mark.slow
def test_json_holds_what_the_library_measures(folder: Path) -> None:
    before = (folder / "config.json").read_bytes()
    ran = run(
        "--against", "dense", "--img-size", 32, "--rounds", 2, "--threads", 1, folder, "--json"
    )
    (printed,) = json.loads(ran.stdout)
    assert printed["ratio"] == printed["forms"][0]["ratio"]
    assert printed["forms"][0]["form"] == "lego"
    assert printed["fastest_fp32"] in [form["form"] for form in printed["forms"][1:]]
    assert len(printed["layers"]) == len(list(lego.lego_modules(lego.load(folder))))
    assert (folder / "config.json").read_bytes() == before


@pytest.mark.slow
def test_accuracy_stands_beside_the_speed(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    weights = tmp_path / "dense.pth"
    torch.save(lego.to_dense(lego.load(folder)).state_dict(), weights)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "photos.npz", images=pixels)
    np.savez(tmp_path / "labelled.npz", images=pixels, labels=np.arange(12) % 10)
    ran = run(folder, "--threads", 1, "--against", "openvino", "openvino-int8", "--rounds", 2,
              "--data", tmp_path / "photos.npz", "--labelled", tmp_path / "labelled.npz",
              "--original-weights", weights, "--json")  # fmt: skip
    (printed,) = json.loads(ran.stdout)
    forms = {form["form"]: form for form in printed["forms"]}
    assert [form["precision"] for form in forms.values()] == ["fp32", "fp32", "int8"]
    counts = {"calibration": 9, "held_out": 3, "labelled": 12}
    assert counts.items() <= printed["judged_by"].items()
    # The original is the network with the weights of the compressed one, so both agree.
    for name in ("lego", "OpenVINO"):
        assert forms[name]["agreement"] == 100
        assert forms[name]["top1"] == pytest.approx(printed["judged_by"]["original_top1"])
    assert 0 <= forms["OpenVINO int8"]["agreement"] <= 100
    assert printed["notes"] == []


def test_options_of_accuracy_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    pixels = np.zeros((7, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "few.npz", images=pixels)
    weights = tmp_path / "dense.pth"
    torch.save(lego.to_dense(lego.load(folder)).state_dict(), weights)
    photos = ("--data", tmp_path / "few.npz", "--original-weights", weights)
    wrong: list[tuple[tuple[object, ...], type[Exception], str]] = [
        (("--labelled", "x"), UsageError, "give --data PHOTOS"),
        (("--data", "x", "--class-map", "x"), UsageError, "give --labelled DATA"),
        (("--data", "x", "--img-size", 32), UsageError, "leave out --img-size"),
        (("--data", "x"), UsageError, "give the original with --original"),
        (("--data", "x", "--original-weights", weights), DataError, "no images at 'x'"),
        (photos, DataError, "holds 7 photos; at least 8 are needed"),
    ]
    for words, kind, message in wrong:
        with pytest.raises(kind, match=message):
            run(folder, *words)


def test_a_rival_whose_package_is_missing_is_refused_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(table.PACKAGES, "openvino-int8", ("no_such_package",))
    with pytest.raises(UsageError, match="--against openvino-int8 needs the package"):
        run(folder, "--against", "openvino-int8")


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a compressed folder"):
        run(tmp_path)
    with pytest.raises(UsageError, match="cores"):
        run(folder, "--threads", 100_000)
    for words in (["--batch", 0], ["--batch", "x"], ["--against", "tensorrt"], ["--rounds", 1]):
        ran = run(folder, *words)
        assert ran.exit_code == 2
        assert "Invalid value" in ran.output or "Got unexpected" in ran.output
