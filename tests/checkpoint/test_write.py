"""What is written, how it is written, and what is never overwritten or left behind."""

from __future__ import annotations

import copy
import errno
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import legocompress as lego
from legocompress import files
from legocompress.errors import (
    CheckpointError,
    OutputError,
    OutputExistsError,
)
from tests.support.folders import CONFIG, TENSORS, Mixed, digest, small


def test_two_savings_give_the_same_bytes(tmp_path: Path) -> None:
    lego.save(small(), tmp_path / "a")
    torch.manual_seed(1)
    again = lego.load(lego.save(small(), tmp_path / "b"))
    assert digest(tmp_path / "a").keys() == {CONFIG, TENSORS}
    torch.manual_seed(0)
    lego.save(copy.deepcopy(again), tmp_path / "c")
    assert digest(tmp_path / "b") == digest(tmp_path / "c")


def test_nothing_dense_is_stored_and_the_file_is_as_large_as_the_ideal_bits(tmp_path: Path) -> None:
    model = small(k=2, dtype="fp16")
    lego.save(model, tmp_path / "a")
    stored = load_file(tmp_path / "a" / TENSORS)
    units = dict(lego.lego_modules(model))
    assert len(units) == 12
    for name in units:
        assert f"{name}.weight" not in stored
        assert stored[f"{name}.index"].dtype == torch.uint8
        assert stored[f"{name}.lego_filters"].dtype == torch.float16
    raw = (tmp_path / "a" / TENSORS).read_bytes()
    header = int.from_bytes(raw[:8], "little")
    report = lego.measure(model, example_input=torch.zeros(1, 3, 32, 32))
    ideal = sum(-(-row.bits // 8) for row in report.rows)
    norms = [b for n, b in model.named_buffers() if "running" in n or "num_batches" in n]
    buffers = sum(b.numel() * b.element_size() for b in norms)
    assert len(raw) - 8 - header == ideal + buffers
    assert header < 150 * len(stored)


def test_what_cannot_be_rebuilt_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no Lego module"):
        lego.save(Mixed(), tmp_path / "a")
    model: Any = small()
    model.fc = nn.Linear(16, 11)
    with pytest.raises(CheckpointError, match=r"first difference at 'fc"):
        lego.save(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("dear")
    with pytest.raises(OutputExistsError, match="holds other files"):
        lego.save(small(), tmp_path / "letters", force=True)
    assert (tmp_path / "letters" / "dear.txt").read_text() == "dear"


def test_an_existing_output_is_kept_without_force_and_replaced_with_it(tmp_path: Path) -> None:
    target = tmp_path / "a"
    lego.save(small(), target)
    (target / "left over").write_text("x")
    before = digest(target)
    with pytest.raises(OutputExistsError, match="--force"):
        lego.save(small(k=2), target)
    assert digest(target) == before
    lego.save(small(k=2), target, force=True)
    assert digest(target).keys() == {CONFIG, TENSORS}
    assert next(iter(lego.lego_modules(lego.load(target))))[1].lego_shape.n_terms == 2
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


FULL_DISK = """
import resource, sys
import legocompress as lego
from legocompress.errors import OutputError
from legocompress_cli.main import main

model = lego.load(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    lego.save(model, sys.argv[1], force=True)
except OutputError as error:
    print(f"OutputError: {error}", flush=True)
sys.argv = ["legocompress", "export", sys.argv[1], "--out", sys.argv[2]]
main()
"""


@pytest.mark.slow
def test_a_full_disk_keeps_the_old_folder_and_leaves_no_litter(tmp_path: Path) -> None:
    lego.save(small(), tmp_path / "a")
    before = digest(tmp_path)
    out = str(tmp_path / "dense.safetensors")
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FULL_DISK, str(tmp_path / "a"), out, "20000"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 1, ran.stderr
    assert ran.stdout.startswith("OutputError: no space left to write")
    assert ran.stderr.startswith("Error: no space left to write")
    assert ran.stderr.count("\n") == 1
    assert digest(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_the_output_is_told_where_it_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot write"):
        lego.save(small(), tmp_path / "file" / "inside")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("file", ["tensors", "config"])
def test_a_disk_that_is_full_at_either_file_keeps_the_old_folder(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    lego.save(model, tmp_path / "a")
    before = digest(tmp_path)
    write_text = Path.write_text

    def fail_tensors(tensors: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    def fail_text(path: Path, text: str, *_: Any) -> int:
        write_text(path, text[: len(text) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    if file == "tensors":
        monkeypatch.setattr(files, "save_file", fail_tensors)
    else:
        monkeypatch.setattr(Path, "write_text", fail_text)
    for target, force in ((tmp_path / "a", True), (tmp_path / "b", False)):
        with pytest.raises(OutputError, match="no space left to write"):
            lego.save(model, target, force=force)
    assert digest(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_read_only_folder_loads_and_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    lego.save(small(), place / "a")
    before = digest(place)

    def refuse(*_: Any, **__: Any) -> None:  # chmod alone does not stop root
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    (place / "a").chmod(0o555)
    place.chmod(0o555)
    try:
        model = lego.load(place / "a")
        for target in (place / "a", place / "b"):
            with pytest.raises(OutputError, match=r"cannot write '.*/[ab]': .*Permission denied"):
                lego.save(model, target, force=True)
        assert digest(place) == before
    finally:
        place.chmod(0o755)
        (place / "a").chmod(0o755)
