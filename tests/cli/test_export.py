"""`export` on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import legocompress as lego
from tests.support.command_line import DENSE, Run, check_error


def test_export_is_loaded_by_timm(run: Run, tmp_path: Path, compressed_folder: Path) -> None:
    ran = run("export", compressed_folder, "--out", tmp_path / "dense.safetensors", "--json")
    assert (ran.code, ran.err) == (0, "")
    printed = json.loads(ran.out)
    path = tmp_path / "dense.safetensors"
    assert printed == {"out": str(path), "bytes": path.stat().st_size}
    plain = lego.create(DENSE, weights=path)
    x = torch.randn(2, 1, 56, 56)
    with torch.no_grad():
        assert torch.equal(plain(x), lego.load(compressed_folder)(x))
    check_error(run("export", compressed_folder, "--out", path), 2, "exists already", "--force")
    assert run("export", compressed_folder, "--out", path, "--force").code == 0


@pytest.mark.slow
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
    run: Run, tmp_path: Path, compressed_folder: Path, words: list[str], name: str
) -> None:
    (tmp_path / "x").symlink_to(compressed_folder)
    ran = run("export", "x", "--to", *words, "--json")
    assert ran.code == 0, ran.err
    assert ran.err == ""
    printed = json.loads(ran.out)
    assert printed["out"] == name
    files = [f for f in (Path(name), *Path(name).glob("*")) if f.is_file()]
    assert printed["bytes"] == sum(f.stat().st_size for f in files) > 0
    if words[0] != "timm":
        assert printed["form"] == ([*words, "lego"][2] if len(words) > 1 else "lego")
        assert printed["relative_difference"] < 1e-4
    check_error(run("export", "x", "--to", *words), 2, "exists already", "--force")


@pytest.mark.slow
def test_export_prints_the_difference_of_outputs(run: Run, compressed_folder: Path) -> None:
    ran = run("export", compressed_folder, "--to", "pt2", "--form", "dense", "--out", "here.pt2")
    assert ran.code == 0
    assert re.search(
        r"the reloaded program against the network: \S+ \(\S+ of the largest\)", ran.out
    )


def test_export_refuses_forms_that_a_kind_cannot_hold(
    run: Run, compressed_folder: Path, tmp_path: Path
) -> None:
    for kind in ("dense", "timm"):
        words = ("export", compressed_folder, "--to", kind, "--form", "lego")
        check_error(run(*words), 2, "--form is for onnx and pt2")
    ran = run(
        "export", compressed_folder, "--to", "pt2", "--form", "assemble-at-load", "--out", "x"
    )
    check_error(ran, 2, "is for ONNX")
    assert not list(tmp_path.iterdir())


def test_export_of_the_current_folder(
    run: Run, compressed_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(compressed_folder)
    ran = run("export", ".")
    out = compressed_folder.parent / "fashion-lego-dense.safetensors"
    inside = [
        path for path in compressed_folder.iterdir() if path.name.endswith("-dense.safetensors")
    ]
    try:
        assert ran.code == 0 or ran.err.startswith("Error: ")
        assert ran.code != 0 or out.is_file() or inside
    finally:
        for path in [out, *inside]:
            path.unlink(missing_ok=True)
