"""`convert` and `inspect` on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import legocompress as lego
from tests.support.command_line import ALL, DEMO, DENSE, SMALL, Run, check_error, list_files


@pytest.mark.slow
def test_convert_writes_what_the_library_writes(
    run: Run, tmp_path: Path, compressed_folder: Path
) -> None:
    ran = run("convert", DENSE, "--k", 2, "--out", tmp_path / "out")
    assert (ran.code, ran.err) == (0, "")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (compressed_folder / name).read_bytes()
    model = lego.load(compressed_folder)
    assert f"{len(list(lego.lego_modules(model)))} of " in ran.out
    totals = lego.measure(model, path=compressed_folder).totals()
    assert f"{totals['theoretical_speedup']:.2f}x" in ran.out
    last = ran.out.splitlines()[-1]
    assert last == (
        f"Accuracy is lost until this has run: legocompress calibrate {tmp_path / 'out'} "
        "--data PHOTOS"
    )
    assert list_files(tmp_path) == {"out", "out/config.json", "out/model.safetensors"}


@pytest.mark.slow
def test_convert_has_a_default_output_and_json(run: Run, tmp_path: Path) -> None:
    ran = run("convert", *SMALL, "--m", 0.5, ALL, "--json", "--seed", 3)
    assert (ran.code, ran.err) == (0, "")
    printed = json.loads(ran.out)
    assert printed["out"] == "resnet18-lego"
    report = lego.measure(lego.load(tmp_path / "resnet18-lego"), path=tmp_path / "resnet18-lego")
    for key, value in report.totals().items():
        assert printed[key] == value, key
    assert printed["skipped"]["conv1"].startswith("stem")
    assert printed["outcome"]["calibrated"] is False
    assert "random" in printed["outcome"]["message"]
    model: Any = lego.load(tmp_path / "resnet18-lego")
    assert lego.lego_state(model).conversion.seed == 3
    assert lego.lego_state(model).source.weights == "random, seed 3"


@pytest.mark.slow
def test_options_reach_the_spec(run: Run, tmp_path: Path) -> None:
    ran = run("convert", *SMALL, "--m", 0.75, "--o", 4, "--k", 3, "--binary", "--dtype", "bf16",
              "--rule", "layer2.*:m=0.5,o=2", "--skip", "layer1.*", "--only", "re:layer.*",
              ALL, "--out", "x")  # fmt: skip
    assert ran.code == 0, ran.err
    model: Any = lego.load(tmp_path / "x")
    assert lego.lego_state(model).conversion.spec == lego.LegoSpec(
        m=0.75, o=4, k=3, coefficients=False, dtype="bf16", rules=["layer2.*:m=0.5,o=2"],
        skip=["layer1.*"], only=["re:layer.*"], allow_expansion=True)  # fmt: skip
    layers = dict(lego.lego_modules(model))
    assert not any(name.startswith("layer1") for name in layers)
    assert layers["layer2.0.conv2"].lego_shape.n_split == 2
    assert layers["layer3.0.conv2"].lego_shape.n_split == 4
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)


@pytest.mark.parametrize("command", [["inspect"], ["convert", "--dry-run"]])
def test_inspect_and_dry_run_write_nothing(run: Run, tmp_path: Path, command: list[str]) -> None:
    ran = run(*command, DENSE, "--k", 2)
    assert (ran.code, ran.err) == (0, "")
    assert list_files(tmp_path) == set()
    plan = lego.plan(lego.create(DENSE), lego.LegoSpec(k=2))
    assert f"{len(plan.layers)} of {len(plan.rows)} layers" in ran.out
    for row in plan.rows:
        assert row.name in ran.out
        assert row.reason is None or row.reason in ran.out
    as_json = run(*command, DENSE, "--k", 2, "--json")
    printed = json.loads(as_json.out)
    assert [layer["name"] for layer in printed["layers"]] == [row.name for row in plan.rows]
    for layer, row in zip(printed["layers"], plan.rows, strict=True):
        for key in ("params", "bits", "macs", "dense_params", "dense_macs", "reason"):
            assert layer[key] == getattr(row, key)
    assert printed["spec"]["k"] == 2
    assert (printed["other_params"], printed["other_bits"]) == (plan.other_params, plan.other_bits)


@pytest.mark.slow
def test_a_budget_sizes_every_layer(run: Run, tmp_path: Path) -> None:
    words = [DENSE, "--max-size", 0.6, "--max-macs", 0.8]
    ran = run("convert", *words, "--only", "layer1.*", "--only", "layer4.*", "--json")
    assert (ran.code, ran.err) == (0, "")
    (folder,) = tmp_path.iterdir()
    requested_spec = lego.LegoSpec(only=["layer1.*", "layer4.*"])
    dense = lego.create(DENSE)
    spec = lego.allocate(dense, requested_spec, max_size=0.6, max_macs=0.8)
    network = lego.load(folder)
    assert lego.lego_state(network).conversion.spec == spec
    totals = lego.measure(network).totals()
    assert totals["bits"] <= 0.6 * totals["dense_bits"]
    assert totals["macs_used_only"] <= 0.8 * totals["dense_macs"]
    inspected = run("inspect", *words, "--skip", "layer3.*")
    assert inspected.code == 0, inspected.err
    assert "skipped by name" in inspected.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-size", 0.3, "--m", 0.5], "--max-size chooses m and o of every layer"),
        (["--max-macs", 0.9, "--o", 2], "--max-macs chooses m and o of every layer"),
        (["--max-macs", 0.9, "--rule", "layer4.*:o=4"], "leave out the budget"),
        (["--max-size", 0.9, "--skip", "*"], "no layer can be converted"),
        (["--max-size", 0.001, "--only", "layer4.*"], "cannot be met"),
    ],
)
def test_budgets_that_cannot_be_used(run: Run, words: list[object], message: str) -> None:
    ran = run("inspect", DENSE, *words)
    assert ran.code in (1, 2)
    check_error(ran, ran.code, message)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["inspect", "convert"])
@pytest.mark.parametrize(
    ("words", "code", "message"),
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
        ([DENSE, "--only", "re:("], 2, "not a regular expression"),
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
def test_bad_input_ends_with_one_sentence(
    run: Run, tmp_path: Path, command: str, words: list[str], code: int, message: str
) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    whole = (DEMO / "fashion-resnet" / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:9999])
    before = list_files(tmp_path)
    ran = run(command, *words)
    check_error(ran, code)
    assert re.search(re.sub(r"[.*()\[\]]", r"\\\g<0>", message), ran.err), ran.err
    assert list_files(tmp_path) == before


@pytest.mark.parametrize("name", ["test_vit", "resmlp_12_224"])
def test_a_network_whose_only_conv_is_its_stem(run: Run, tmp_path: Path, name: str) -> None:
    ran = run("convert", name, "--no-pretrained")
    check_error(ran, 1, "no layer can be converted: ", "stem", "--linear takes it in")
    assert list_files(tmp_path) == set()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(run: Run, tmp_path: Path, value: float) -> None:
    state = load_file(DEMO / "fashion-resnet" / "model.safetensors")
    state["layer2.0.conv2.weight"][3, 2, 1, 0] = value
    save_file(state, tmp_path / "bad.safetensors")
    ran = run("convert", DENSE, "--weights", "bad.safetensors", "--out", "out")
    check_error(ran, 1, "'layer2.0.conv2'", "NaN or infinity", "--skip")
    assert list_files(tmp_path) == {"bad.safetensors"}


@pytest.mark.slow
def test_an_existing_output(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    check_error(run("convert", DENSE, "--out", "out"), 2, "'out' exists already", "--force")
    foreign = run("convert", DENSE, "--out", "out", "--force")
    check_error(foreign, 2, "'out' holds other files")
    assert list_files(tmp_path) == {"out", "out/precious"}
    (tmp_path / "out" / "precious").unlink()
    for m in (0.5, 0.25):
        assert run("convert", DENSE, "--m", m, "--o", 4, "--out", "out", "--force").code == 0
        assert list_files(tmp_path) == {"out", "out/config.json", "out/model.safetensors"}
    n_lego = {m.lego_shape.n_lego for _, m in lego.lego_modules(lego.load(tmp_path / "out"))}
    assert n_lego == {4, 8, 16, 32}


def test_a_compressed_folder_is_not_converted_again(run: Run, compressed_folder: Path) -> None:
    check_error(run("convert", compressed_folder, "--out", "x"), 2, "compressed already")
    check_error(run("inspect", compressed_folder), 2, "compressed already")


@pytest.mark.parametrize("seed", [2**70, -(2**70)])
def test_seeds_beyond_what_generators_take(run: Run, seed: int) -> None:
    ran = run("convert", *SMALL, "--seed", seed, "--dry-run")
    assert ran.code == 2
    assert "seed" in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("device", ["cuda:99", "no_such", "meta"])
def test_devices_that_are_not_available(run: Run, device: str) -> None:
    check_error(run("convert", DENSE, "--device", device, "--out", "x"), 2, "--device")
