"""The folder of a run: its files, and what overwrites or damages them."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import legocompress as lego
from legocompress.errors import (
    LegoError,
    OutputError,
    OutputExistsError,
)
from legocompress.finetune.epoch import Epoch
from legocompress.finetune.loop import finetune_
from legocompress.finetune.run_folder import RunFolder, find_run_folder
from tests.support.disks import full_disk
from tests.support.finetuning import compute_outputs, train
from tests.support.folders import digest
from tests.support.tiny import compressed, recipe

ONE_FROZEN_EPOCH = [{"epochs": 1, "indices": "frozen"}]
ONE_EPOCH = [{"epochs": 1, "rates": {"proxies": 100.0}}]


def test_the_files_of_a_run(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    _, epochs = train(compressed(), images, {}, out=out, args={"checkpoint": "x"})
    assert {path.name for path in out.iterdir()} == {"args.yaml", "summary.csv", "state.pt", "best",
                                                     "last"}  # fmt: skip
    with (out / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert [float(row["eval_top1"]) for row in rows] == [e.top1 for e in epochs]
    assert [float(row["train_loss"]) for row in rows] == [e.progress.loss for e in epochs]
    args = yaml.safe_load((out / "args.yaml").read_text())
    assert args["checkpoint"] == "x"
    assert args["recipe"] == recipe().model_dump(mode="json")
    again = lego.load(out / "best")
    assert lego.lego_state(again).conversion.recipe == args["recipe"]  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_run_is_not_overwritten(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(compressed(), images, {"stages": ONE_EPOCH}, out=out)
    with pytest.raises(OutputExistsError, match="--resume"):
        train(compressed(), images, {"stages": ONE_EPOCH}, out=out)
    train(compressed(), images, {"stages": ONE_FROZEN_EPOCH}, out=out, force=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    for force in (False, True):
        with pytest.raises(OutputExistsError):
            train(compressed(), images, {"stages": ONE_EPOCH}, out=other, force=force)
    assert (other / "thesis.tex").exists()


def test_a_damaged_state_is_reported(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(compressed(), images, {"stages": ONE_EPOCH}, out=out)
    for raw in (b"", b"x" * 99, (out / "state.pt").read_bytes()[:-500]):
        (out / "state.pt").write_bytes(raw)
        with pytest.raises(LegoError, match="damaged"):
            train(compressed(), images, {"stages": ONE_EPOCH}, out=out, resume=True)


def test_a_full_disk_changes_no_file_of_a_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    folder = RunFolder(out)
    folder.start_run({"lr": 1.0}, force=False)
    folder.save_state({"step": 1})
    row = {"epoch": 0, "train": {"loss": 1.0}, "eval": {"top1": 2.0}, "lr": 0.1}
    folder.write_summary([row])
    (out / "best").mkdir()
    (out / "best" / "config.json").write_text("{}")
    before = digest(out)
    writes: list[Callable[[], None]] = [
        lambda: folder.start_run({"lr": 2.0}, force=True),
        lambda: folder.save_state({"step": 2}),
        lambda: folder.write_summary([row, row]),
    ]
    for write in writes:
        with full_disk(0), pytest.raises(OutputError, match="no space left"):
            write()
        assert digest(out) == before
    folder.start_run({"lr": 2.0}, force=True)
    assert [path.name for path in out.iterdir()] == ["args.yaml"]
    assert yaml.safe_load((out / "args.yaml").read_text()) == {"lr": 2.0}


@pytest.mark.slow
@pytest.mark.parametrize("limit", [2_000, 30_000])
def test_a_full_disk_leaves_the_earlier_checkpoint(
    limit: int, images: Path, tmp_path: Path
) -> None:
    """The smaller limit stops the network's file, the larger one the state's."""
    out = tmp_path / "run"
    model, settings = compressed(), recipe()
    data = lego.open_training(model, settings, str(images))
    first: dict[str, bytes] = {}
    stack = full_disk(limit)

    def fill(epoch: Epoch) -> None:
        if not first:
            first.update({str(p): p.read_bytes() for p in out.rglob("*") if p.is_file()})
            stack.__enter__()

    try:
        with pytest.raises(OutputError, match="no space left"):
            finetune_(model, settings, *data, out=out, on_epoch=fill)
    finally:
        stack.__exit__(None, None, None)
    state = str(out / "state.pt")
    assert Path(state).read_bytes() == first[state]
    lego.load(out / "best")
    resumed, _ = train(compressed(), images, {}, out=out, resume=True)
    whole, _ = train(compressed(), images, {})
    assert torch.equal(compute_outputs(resumed), compute_outputs(whole))


def test_a_summary_is_read_back_and_odd_cells_are_left_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_summary() == []
    row = {"epoch": 0, "train": {"loss": 2.5}, "eval": {"top1": None, "top5": 7.0}, "lr": 0.1}
    folder.write_summary([row, {**row, "epoch": 1, "lr": 0.01}])
    first, second = folder.read_summary()
    assert first == {"epoch": 0, "train_loss": 2.5, "eval_top5": 7.0, "lr": 0.1}
    assert second == {**first, "epoch": 1, "lr": 0.01}
    (tmp_path / "summary.csv").write_text("a,b,c\n1,nan,<b>\n2\n3,4,inf,5\n")
    assert folder.read_summary() == [{"a": 1}, {"a": 2}, {"a": 3, "b": 4}]
    (tmp_path / "summary.csv").write_bytes(b"a\n\xff\n")
    assert folder.read_summary() == []


def test_the_run_of_a_compressed_folder_is_found(tmp_path: Path) -> None:
    assert find_run_folder(tmp_path / "best") is None
    (tmp_path / "summary.csv").touch()
    assert find_run_folder(tmp_path / "best") == tmp_path
    assert find_run_folder(tmp_path / "last") == tmp_path
    assert find_run_folder(tmp_path / "other") is None
