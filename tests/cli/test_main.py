"""The command line: what it prints and writes, and how every bad input ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from legocompress_cli.demo import SETTINGS
from legocompress_cli.main import cli, main
from PIL import Image
from safetensors.torch import load_file, save_file

import legocompress as lego

DEMO = Path(str(files("legocompress") / "demo"))
DENSE = f"local-dir:{DEMO / 'fashion-resnet'}"
PHOTOS = str(DEMO / "fashion-calibration.npz")
SAMPLE = str(DEMO / "fashion-sample.npz")
SIZES = ["--model-kwargs", "channels=[8,8,16,16]", "--model-kwargs", "layers=[1,1,1,1]"]
SMALL = ["resnet18", "--no-pretrained", "--num-classes", "4", "--img-size", "32", *SIZES]
ALL = "--allow-expansion"


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command in this process, as its script would, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run_command(*words: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["legocompress", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        return Ran(code, *capsys.readouterr())

    return run_command


def failed(ran: Ran, code: int, *words: str) -> None:
    """One line on standard error and nothing else."""
    assert ran.code == code, ran.err
    assert ran.out == ""
    assert re.fullmatch(r"Error: [^\n]+\n", ran.err), ran.err
    assert "Traceback" not in ran.err
    for word in words:
        assert word in ran.err


def snapshot(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*")}


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo network, converted and saved by the library."""
    model = lego.create(DENSE)
    lego.convert_(model, lego.plan(model, lego.LegoSpec(m=0.5, o=2, k=2)))
    return lego.save(model, tmp_path_factory.mktemp("compressed") / "fashion-lego")


# What the commands do


def test_convert_writes_what_the_library_writes(run: Run, tmp_path: Path, compressed: Path) -> None:
    ran = run("convert", DENSE, "--k", 2, "--out", tmp_path / "out")
    assert (ran.code, ran.err) == (0, "")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (compressed / name).read_bytes()
    model = lego.load(compressed)
    assert f"{len(list(lego.lego_modules(model)))} of " in ran.out
    totals = lego.measure(model, path=compressed).totals()
    assert f"{totals['theoretical_speedup']:.2f}x" in ran.out
    assert "legocompress report" in ran.out
    assert snapshot(tmp_path) == {"out", "out/config.json", "out/model.safetensors"}


def test_convert_has_a_default_output_and_json(run: Run, tmp_path: Path) -> None:
    ran = run("convert", *SMALL, "--m", 0.5, ALL, "--json", "--seed", 3)
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert found["out"] == "resnet18-lego"
    report = lego.measure(lego.load(tmp_path / "resnet18-lego"), path=tmp_path / "resnet18-lego")
    for key, value in report.totals().items():
        assert found[key] == value, key
    assert found["skipped"]["conv1"].startswith("stem")
    model: Any = lego.load(tmp_path / "resnet18-lego")
    assert model.lego_record.seed == 3
    assert model.lego_source.weights == "random, seed 3"


def test_options_reach_the_spec(run: Run, tmp_path: Path) -> None:
    ran = run("convert", *SMALL, "--m", 0.75, "--o", 4, "--k", 3, "--binary", "--dtype", "bf16",
              "--rule", "layer2.*:m=0.5,o=2", "--skip", "layer1.*", "--only", "re:layer.*",
              ALL, "--out", "x")  # fmt: skip
    assert ran.code == 0, ran.err
    model: Any = lego.load(tmp_path / "x")
    assert model.lego_record.spec == lego.LegoSpec(
        m=0.75, o=4, k=3, coefficients=False, dtype="bf16", rules=["layer2.*:m=0.5,o=2"],
        skip=["layer1.*"], only=["re:layer.*"], allow_expansion=True)  # fmt: skip
    units = dict(lego.lego_modules(model))
    assert not any(name.startswith("layer1") for name in units)
    assert units["layer2.0.conv2"].lego_shape.n_split == 2
    assert units["layer3.0.conv2"].lego_shape.n_split == 4
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)


@pytest.mark.parametrize("command", [["inspect"], ["convert", "--dry-run"]])
def test_looking_writes_nothing(run: Run, tmp_path: Path, command: list[str]) -> None:
    ran = run(*command, DENSE, "--k", 2)
    assert (ran.code, ran.err) == (0, "")
    assert snapshot(tmp_path) == set()
    plan = lego.plan(lego.create(DENSE), lego.LegoSpec(k=2))
    assert f"{len(plan.layers)} of {len(plan.rows)} layers" in ran.out
    for row in plan.rows:
        assert row.name in ran.out
        assert row.reason is None or row.reason in ran.out
    as_json = run(*command, DENSE, "--k", 2, "--json")
    found = json.loads(as_json.out)
    assert [layer["name"] for layer in found["layers"]] == [row.name for row in plan.rows]
    for layer, row in zip(found["layers"], plan.rows, strict=True):
        for key in ("params", "bits", "macs", "dense_params", "dense_macs", "reason"):
            assert layer[key] == getattr(row, key)
    assert found["spec"]["k"] == 2
    assert (found["other_params"], found["other_bits"]) == (plan.other_params, plan.other_bits)


def test_a_budget_sizes_every_layer(run: Run, tmp_path: Path) -> None:
    words = [DENSE, "--max-size", 0.6, "--max-macs", 0.8]
    ran = run("convert", *words, "--only", "layer1.*", "--only", "layer4.*", "--json")
    assert (ran.code, ran.err) == (0, "")
    (folder,) = tmp_path.iterdir()
    asked = lego.LegoSpec(only=["layer1.*", "layer4.*"])
    dense = lego.create(DENSE)
    spec = lego.allocate(dense, asked, max_size=0.6, max_macs=0.8)
    found = lego.load(folder)
    assert found.lego_record.spec == spec
    totals = lego.measure(found).totals()
    assert totals["bits"] <= 0.6 * totals["dense_bits"]
    assert totals["macs_used_only"] <= 0.8 * totals["dense_macs"]
    shown = run("inspect", *words, "--skip", "layer3.*")
    assert shown.code == 0, shown.err
    assert "skipped by name" in shown.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-size", 0.3, "--m", 0.5], "--max-size chooses m and o of every layer"),
        (["--max-macs", 0.9, "--o", 2], "--max-macs chooses m and o of every layer"),
        (["--max-macs", 0.9, "--rule", "layer4.*:o=4"], "leave out the budget"),
        (["--max-size", 0.9, "--skip", "*"], "no layer can be converted"),
        (["--max-size", 0.001, "--only", "layer4.*"], "cannot be met"),
    ],
)
def test_budgets_that_mean_nothing(run: Run, words: list[object], said: str) -> None:
    ran = run("inspect", DENSE, *words)
    assert ran.code in (1, 2)
    failed(ran, ran.code, said)


def test_report_says_what_the_library_measures(run: Run, compressed: Path) -> None:
    ran = run("report", compressed)
    assert (ran.code, ran.err) == (0, "")
    report = lego.measure(lego.load(compressed), path=compressed)
    totals = report.totals()
    assert f"{totals['theoretical_speedup']:.2f}x" in ran.out
    assert f"{totals['relative_weight_error']:.4f}" in ran.out
    assert "(agrees)" in ran.out
    assert all(row.name in ran.out for row in report.rows)
    found = json.loads(run("report", compressed, "--json").out)
    assert found == json.loads(json.dumps({**report.to_dict(), "calibration": None}))
    assert found["totals"]["stored_bytes"] == sum(f.stat().st_size for f in compressed.iterdir())


def test_report_times_the_forms(run: Run, compressed: Path) -> None:
    ran = run("report", compressed, "--repeats", 1)
    assert (ran.code, ran.err) == (0, "")
    lines = [line for line in ran.out.splitlines() if line.startswith("measured ")]
    assert [line.split()[1] for line in lines] == ["dense", "assembled", "reference"]
    assert " 1.00x the speed of dense" in lines[0]
    assert all("1 threads" in line and "batch 1" in line for line in lines)


def test_evaluate_says_what_the_library_finds(run: Run, compressed: Path) -> None:
    ran = run("evaluate", compressed, "--data", SAMPLE, "--original", DENSE, "-b", 250, "--json")
    assert (ran.code, ran.err) == (0, "")
    model, dense = lego.load(compressed), lego.create(DENSE)
    expected = lego.evaluate(model, lego.open_images(SAMPLE, model).batches(250), dense)
    found = json.loads(ran.out)
    assert found == pytest.approx(asdict(expected))
    assert found["images"] == 1000
    assert 85 < found["original_top1"] < 97
    weights = DEMO / "fashion-resnet" / "model.safetensors"
    again = run("evaluate", compressed, "--data", SAMPLE, "--original-weights", weights)
    assert f"agreement    {expected.agreement:.2f} %" in again.out
    assert f"(original {expected.original_top1:.2f} %)" in again.out


def test_export_is_loaded_by_timm(run: Run, tmp_path: Path, compressed: Path) -> None:
    ran = run("export", compressed, "--out", tmp_path / "dense.safetensors", "--json")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    path = tmp_path / "dense.safetensors"
    assert found == {"out": str(path), "bytes": path.stat().st_size}
    plain = lego.create(DENSE, weights=path)
    x = torch.randn(2, 1, 56, 56)
    with torch.no_grad():
        assert torch.equal(plain(x), lego.load(compressed)(x))
    failed(run("export", compressed, "--out", path), 2, "exists already", "--force")
    assert run("export", compressed, "--out", path, "--force").code == 0


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["onnx"], "x.onnx"),
        (["onnx", "--form", "dense"], "x-dense.onnx"),
        (["pt2", "--form", "dense"], "x-dense.pt2"),
        (["timm"], "x-timm"),
    ],
    ids=" ".join,
)
def test_export_writes_every_kind(
    run: Run, tmp_path: Path, compressed: Path, words: list[str], name: str
) -> None:
    (tmp_path / "x").symlink_to(compressed)
    ran = run("export", "x", "--to", *words, "--json")
    assert ran.code == 0, ran.err
    assert ran.err == ""
    told = json.loads(ran.out)
    assert told["out"] == name
    files = [f for f in (Path(name), *Path(name).glob("*")) if f.is_file()]
    assert told["bytes"] == sum(f.stat().st_size for f in files) > 0
    if words[0] != "timm":
        assert told["form"] == ([*words, "lego"][2] if len(words) > 1 else "lego")
        assert told["relative_difference"] < 1e-4
    failed(run("export", "x", "--to", *words), 2, "exists already", "--force")


def test_export_shows_how_far_off_it_is(run: Run, compressed: Path) -> None:
    ran = run("export", compressed, "--to", "pt2", "--form", "dense", "--out", "here.pt2")
    assert ran.code == 0
    assert re.search(
        r"the reloaded program against the network: \S+ \(\S+ of the largest\)", ran.out
    )


def test_export_tells_what_a_kind_cannot_hold(run: Run, compressed: Path, tmp_path: Path) -> None:
    for kind in ("dense", "timm"):
        words = ("export", compressed, "--to", kind, "--form", "lego")
        failed(run(*words), 2, "--form is for onnx and pt2")
    words = ("export", compressed, "--to", "pt2", "--form", "assemble-at-load", "--out", "x")
    failed(run(*words), 2, "is for ONNX")
    assert not list(tmp_path.iterdir())


def test_export_of_the_folder_one_stands_in(
    run: Run, compressed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(compressed)
    ran = run("export", ".")
    out = compressed.parent / "fashion-lego-dense.safetensors"
    inside = [path for path in compressed.iterdir() if path.name.endswith("-dense.safetensors")]
    try:
        assert ran.code == 0 or ran.err.startswith("Error: ")
        assert ran.code != 0 or out.is_file() or inside
    finally:
        for path in [out, *inside]:
            path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    "command",
    ["", "convert", "inspect", "calibrate", "report", "evaluate", "export", "push", "demo"],
)
def test_every_command_has_help(command: str) -> None:
    words = [command] if command else []
    for flag in ("--help", "-h"):
        found = CliRunner().invoke(cli, [*words, flag])
        assert found.exit_code == 0
        assert found.output.startswith("Usage: ")
        options = cli.commands[command].params if command else cli.params
        for option in options:
            if option.param_type_name == "option":
                assert option.opts[0] in found.output
                assert option.help, f"{command} {option.opts}"
    if not command:
        assert {"convert", "inspect", "report", "evaluate", "export", "push", "demo"} <= set(
            re.findall(r"^  (\w+) ", found.output, re.MULTILINE)
        )


def test_version(run: Run) -> None:
    assert lego.__version__ in run("--version").out


def test_calibration_repairs_and_is_reported(run: Run, tmp_path: Path, compressed: Path) -> None:
    options = ["--data", PHOTOS, "--images", 60, "--epochs", 1]
    ran = run("calibrate", compressed, "--out", tmp_path / "out", *options)
    assert (ran.code, ran.err) == (0, "")
    assert "layer1.0.conv1" in ran.out
    assert {path.name for path in tmp_path.iterdir()} == {"out"}  # no journal is left
    record = lego.load(tmp_path / "out").lego_calibration
    assert isinstance(record, lego.Calibration)
    assert (record.images, record.synthetic) == (60, False)
    assert record.error_after < record.error_before
    told = json.loads(run("report", tmp_path / "out", "--json").out)
    assert told["calibration"] == record.model_dump()
    assert "calibrated with 60 unlabelled images" in run("report", tmp_path / "out").out
    assert json.loads(run("report", compressed, "--json").out)["calibration"] is None


def test_calibration_tells_accuracy_where_labels_are_given(
    run: Run, tmp_path: Path, compressed: Path
) -> None:
    words = ["calibrate", compressed, "--data", PHOTOS, "--images", 60, "--epochs", 1]
    ran = run(*words, "--labelled", SAMPLE, "--out", tmp_path / "out", "--json")
    assert (ran.code, ran.err) == (0, "")
    told = json.loads(ran.out)["accuracy"]
    assert lego.load(tmp_path / "out").lego_calibration.accuracy.model_dump() == told
    for folder, key in ((compressed, "before"), (tmp_path / "out", "after")):
        found = json.loads(run("evaluate", folder, "--data", SAMPLE, "--json").out)
        assert (found["images"], found["top1"]) == (told["images"], pytest.approx(told[key]))
    assert told["before"] < told["after"] < told["original"]
    assert f"-> {told['after']:>8.1f} %   (original" in run("report", tmp_path / "out").out
    failed(run(*words, "--labelled", PHOTOS, "--out", tmp_path / "other"), 2, "no labels")


def test_convert_calibrates_too(run: Run, tmp_path: Path) -> None:
    words = ["convert", DENSE, "--images", 20, "--epochs", 0, "--only", "layer1.*", "--json"]
    told = {}
    for name in (PHOTOS, "synthetic"):
        ran = run(*words, "--calibrate", name, "--out", tmp_path / Path(name).stem)
        assert (ran.code, ran.err) == (0, "")
        told[name] = json.loads(ran.out)["calibration"]
        assert told[name]["error_after"] < told[name]["error_before"]
    assert [told[name]["synthetic"] for name in told] == [False, True]
    # Judged on other images each: of its own kind.
    assert told[PHOTOS]["sha256"] != told["synthetic"]["sha256"]


def test_few_photos_are_cropped_when_asked(run: Run, tmp_path: Path, compressed: Path) -> None:
    with np.load(PHOTOS) as file:
        np.savez(tmp_path / "few.npz", images=file["images"][:12])
    words = ["calibrate", compressed, "--data", tmp_path / "few.npz", "--epochs", 0, "--out"]
    ran = run(*words, tmp_path / "whole")
    assert ran.code == 0
    assert "12 images are few: --crops 22 would take" in ran.err
    ran = run(*words, tmp_path / "parts", "--crops", 3)
    assert (ran.code, ran.err) == (0, "")
    record = lego.load(tmp_path / "parts").lego_calibration
    assert (record.images, record.crops) == (36, 3)
    told = "calibrated with 36 unlabelled images (3 random crops of each photo)"
    assert told in run("report", tmp_path / "parts").out
    words[3] = "synthetic"
    failed(run(*words, tmp_path / "other", "--crops", 3), 2, "--crops takes parts of photos")


def test_calibration_needs_an_original_and_images(
    run: Run, tmp_path: Path, compressed: Path
) -> None:
    words = ["calibrate", compressed, "--out", tmp_path / "out"]
    failed(run(*words, "--data", tmp_path / "nowhere", "--original", DENSE), 1, "no images at")
    model = lego.create(DENSE, weights=DEMO / "fashion-resnet" / "model.safetensors")
    lego.convert_(model, lego.plan(model))
    lego.save(model, tmp_path / "by-file")
    failed(run("calibrate", tmp_path / "by-file", "--data", PHOTOS), 2, "--original-weights")
    few = tmp_path / "few"
    few.mkdir()
    Image.new("L", (28, 28)).save(few / "one.png")
    failed(run(*words, "--data", few, "--original", DENSE), 1, "1 images are too few")
    assert {path.name for path in tmp_path.iterdir()} == {"few", "by-file"}


# How bad input ends


@pytest.fixture
def broken(tmp_path: Path, compressed: Path) -> Path:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_bytes((compressed / "config.json").read_bytes())
    raw = (compressed / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:5000])
    return folder


@pytest.mark.parametrize("command", ["inspect", "convert"])
@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ([DENSE, "--m", "0"], 2, "m=0"),
        ([DENSE, "--m", "-0.5"], 2, "m=-0.5"),
        ([DENSE, "--m", "nan"], 2, "m=nan"),
        ([DENSE, "--m", "1.5"], 2, "--allow-expansion"),
        ([DENSE, "--o", "0"], 2, "o=0"),
        ([DENSE, "--k", "0"], 2, "k=0"),
        ([DENSE, "--o", "7"], 2, "values that divide some"),
        ([DENSE, "--skip", "no_such.*"], 2, "--skip pattern 'no_such.*' matches none"),
        ([DENSE, "--only", "no_such"], 2, "--only"),
        ([DENSE, "--only", "re:("], 2, "no regular expression"),
        ([DENSE, "--rule", "no_such:m=0.5"], 2, "--rule"),
        ([DENSE, "--rule", "layer1"], 2, "PATTERN:key=value"),
        ([DENSE, "--rule", "layer1.*:q=1"], 2, "q"),
        ([DENSE, "--rule", "layer1.*:m=2"], 2, "--allow-expansion"),
        ([DENSE, "--model-kwargs", "a"], 2, "KEY=VALUE"),
        ([DENSE, "--model-kwargs", "a=["], 2, "YAML"),
        ([DENSE, "--model-kwargs", "no_such=1"], 2, "no_such"),
        (["resnet18", "--no-pretrained", "--model-kwargs", "pretrained=true"], 2, "pretrained"),
        (["resnet18", "--no-pretrained", "--model-kwargs", "checkpoint_path=x"], 2, "checkpoint"),
        ([DENSE, "--mean", "0.1", "--mean", "0.2"], 2, "--mean"),
        ([DENSE, "--interpolation", "no_such"], 2, "interpolation"),
        (["resnet1888", "--no-pretrained"], 2, "nearest names are resnet"),
        (["no/such/folder"], 2, "unknown model source"),
        ([DENSE, "--weights", "nowhere.pth"], 1, "does not exist"),
        ([DENSE, "--weights", "other.safetensors"], 1, "do not fit"),
        ([DENSE, "--weights", "cut.safetensors"], 1, "cannot be read"),
        (["local-dir:nowhere"], 1, "no model configuration"),
    ],
)
def test_bad_input(
    run: Run, tmp_path: Path, command: str, words: list[str], code: int, told: str
) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    whole = (DEMO / "fashion-resnet" / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:9999])
    before = snapshot(tmp_path)
    ran = run(command, *words)
    failed(ran, code)
    assert re.search(re.sub(r"[.*()\[\]]", r"\\\g<0>", told), ran.err), ran.err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["test_vit", "resmlp_12_224"])
def test_a_network_whose_one_conv_is_its_stem(run: Run, tmp_path: Path, name: str) -> None:
    ran = run("convert", name, "--no-pretrained")
    failed(ran, 1, "no layer can be converted: ", "stem", "--linear takes it in")
    assert snapshot(tmp_path) == set()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(run: Run, tmp_path: Path, value: float) -> None:
    state = load_file(DEMO / "fashion-resnet" / "model.safetensors")
    state["layer2.0.conv2.weight"][3, 2, 1, 0] = value
    save_file(state, tmp_path / "bad.safetensors")
    ran = run("convert", DENSE, "--weights", "bad.safetensors", "--out", "out")
    failed(ran, 1, "'layer2.0.conv2'", "NaN or infinity", "--skip")
    assert snapshot(tmp_path) == {"bad.safetensors"}


def test_an_existing_output(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    failed(run("convert", DENSE, "--out", "out"), 2, "'out' exists already", "--force")
    foreign = run("convert", DENSE, "--out", "out", "--force")
    failed(foreign, 2, "'out' holds other files")
    assert snapshot(tmp_path) == {"out", "out/precious"}
    (tmp_path / "out" / "precious").unlink()
    for m in (0.5, 0.25):
        assert run("convert", DENSE, "--m", m, "--o", 4, "--out", "out", "--force").code == 0
        assert snapshot(tmp_path) == {"out", "out/config.json", "out/model.safetensors"}
    n_lego = {m.lego_shape.n_lego for _, m in lego.lego_modules(lego.load(tmp_path / "out"))}
    assert n_lego == {4, 8, 16, 32}


@pytest.mark.parametrize("command", ["report", "export", "convert", "inspect", "evaluate"])
def test_a_truncated_folder(run: Run, tmp_path: Path, broken: Path, command: str) -> None:
    before = snapshot(tmp_path)
    extra = ["--data", SAMPLE] if command == "evaluate" else []
    failed(run(command, broken, *extra), 1, "model.safetensors", "damaged")
    assert snapshot(tmp_path) == before


def test_what_is_no_compressed_folder(run: Run, tmp_path: Path) -> None:
    for command in ("report", "export"):
        failed(run(command, "nowhere"), 1, "'nowhere' is not a compressed folder")
        failed(run(command, DEMO / "fashion-resnet"), 1, "no compression_config")
    assert snapshot(tmp_path) == set()


def test_a_compressed_folder_is_not_converted_again(run: Run, compressed: Path) -> None:
    failed(run("convert", compressed, "--out", "x"), 2, "compressed already")
    failed(run("inspect", compressed), 2, "compressed already")


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images(run: Run, tmp_path: Path, compressed: Path, workers: int) -> None:
    failed(run("evaluate", compressed, "--data", "nowhere", "-j", workers), 1, "no images at")
    failed(run("evaluate", compressed, "--data", "no/x.npz", "-j", workers), 1, "no/x.npz")
    (tmp_path / "pictures").mkdir()
    failed(run("evaluate", compressed, "--data", "pictures", "-j", workers), 1, "holds no images")
    Image.new("L", (60, 60)).save(tmp_path / "pictures" / "a.png")
    failed(run("evaluate", compressed, "--data", "pictures"), 2, "has no labels", "--original")
    (tmp_path / "pictures" / "b.png").write_bytes(b"\x89PNG\r\n\x1a\nxx")
    ran = run(
        "evaluate", compressed, "--data", "pictures", "--original", DENSE, "-j", workers, "-b", 1
    )
    failed(ran, 1, "b.png' cannot be read")


def test_originals_that_do_not_fit(run: Run, compressed: Path) -> None:
    ran = run("evaluate", compressed, "--data", SAMPLE, "--original", "no_such_network")
    failed(ran, 2, "no_such_network")
    ran = run("evaluate", compressed, "--data", SAMPLE, "--original-weights", "nowhere")
    failed(ran, 1, "does not exist")


def test_options_of_a_model_are_not_ignored_for_a_folder(run: Run, compressed: Path) -> None:
    ran = run("evaluate", compressed, "--data", SAMPLE, "--num-classes", 3)
    failed(ran, 2, "num_classes")


def test_the_image_size_alone_can_be_given_for_a_grey_network(run: Run) -> None:
    ran = run("evaluate", DENSE, "--data", SAMPLE, "--img-size", 56, "--json")
    assert (ran.code, ran.err) == (0, "")
    plain = run("evaluate", DENSE, "--data", SAMPLE, "--json")
    assert json.loads(ran.out) == json.loads(plain.out)


def test_usage_errors_of_click(run: Run) -> None:
    for words in (["convert"], ["convert", DENSE, "--no-such"], ["no-such"],
                  ["convert", DENSE, "--m", "x"], ["evaluate", DENSE]):  # fmt: skip
        ran = run(*words)
        assert ran.code == 2
        assert ran.out == ""
        assert ran.err.splitlines()[-1].startswith("Error: ")
        assert "Traceback" not in ran.err


@pytest.mark.parametrize("device", ["cuda:99", "no_such", "meta"])
def test_devices_that_are_not_there(run: Run, device: str) -> None:
    failed(run("convert", DENSE, "--device", device, "--out", "x"), 2, "--device")


@pytest.mark.parametrize("seed", [2**70, -(2**70)])
def test_seeds_beyond_what_generators_take(run: Run, seed: int) -> None:
    ran = run("convert", *SMALL, "--seed", seed, "--dry-run")
    assert ran.code == 2
    assert "seed" in ran.err
    assert "Traceback" not in ran.err


def test_debug_shows_the_traceback(run: Run) -> None:
    with pytest.raises(lego.LegoError, match="m=0"):
        run("--debug", "inspect", DENSE, "--m", "0")


# As processes of their own


COMMAND = [sys.executable, "-c", "from legocompress_cli.main import main; main()"]


def test_the_process_ends_as_main_says(tmp_path: Path) -> None:
    ran = subprocess.run(
        [*COMMAND, "--debug", "convert", DENSE, "--m", "0"],
        capture_output=True, text=True, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert ran.returncode != 0
    assert "Traceback" in ran.stderr
    assert "SpecError: m=0.0" in ran.stderr
    ran = subprocess.run(
        [*COMMAND, "convert", DENSE, "--m", "0"],
        capture_output=True, text=True, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    failed(Ran(ran.returncode, ran.stdout, ran.stderr), 2, "m=0")


def test_a_reader_that_leaves_is_no_traceback(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "inspect", DENSE],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    process.wait(300)
    assert "Traceback" not in errors


# A shell starts what runs in its background with interrupts ignored; so may these tests run.
STARTED = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from legocompress_cli.main import main
print("ready", flush=True)
main()
"""


@pytest.mark.slow
def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STARTED, "convert", "resnet50", "--no-pretrained", "--k", "4",
         "--out", "out"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert out == ""
    assert err.strip() == "Interrupted; no output was left half written."
    assert list(tmp_path.iterdir()) == []


# The demonstration


@pytest.mark.slow
def test_the_demo_runs_and_its_numbers_are_those_of_the_library(run: Run, tmp_path: Path) -> None:
    ran = run("demo", "--out", tmp_path / "kept")
    assert (ran.code, ran.err) == (0, "")
    names = [f"m{spec.m:g}-o{spec.o}-k{spec.k}" for spec in SETTINGS]
    kept = {path.name for path in (tmp_path / "kept").iterdir()}
    assert set(names) <= kept, kept
    dense = lego.create(DENSE)
    images = lego.open_images(SAMPLE, dense)
    before = lego.evaluate(dense, images.batches(250))
    assert f"top-1        {before.top1:.2f} %" in ran.out
    table = ran.out.partition("What it gained and lost")[2]
    rows = {
        line.split()[0]: re.split(r"\s{2,}", line.strip())
        for line in table.splitlines()
        if line.strip()
    }
    tops = {}
    for name in names:
        folder = tmp_path / "kept" / name
        model = lego.load(folder)
        found = lego.evaluate(model, images.batches(250), dense)
        totals = lego.measure(model, path=folder).totals()
        tops[name] = found.top1
        cells = rows[name]
        stored = totals["stored_bytes"]
        assert cells == [
            name,
            f"{stored / 1e3:.2f} kB",
            f"{totals['dense_bits'] / stored / 8:.2f}x",
            f"{totals['macs'] / 1e6:.2f}M",
            f"{totals['theoretical_speedup']:.2f}x",
            f"{found.top1:.1f} %",
            cells[6],
            f"{found.agreement:.1f} %",
        ]
        told = (
            f"{cells[6]} by clustering alone, {found.top1:.1f} % calibrated, of {before.top1:.1f} %"
        )
        assert f"{name}: top-1 {told}" in ran.out
        assert found.top1 > float(cells[6].rstrip(" %")) + 40
    best = max(tops, key=lambda name: tops[name] or 0)
    assert f"reload {best} from its folder alone" in ran.out
    assert "dense export loads strictly; largest output difference 0.0e+00" in ran.out
