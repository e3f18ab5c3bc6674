"""The numbers of a run reach the tracker that the user has installed."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from legocompress.errors import OutputError, UsageError
from legocompress.finetune.epoch import Epoch
from legocompress.finetune.loggers import TRACKERS, JsonLines, open_logger
from legocompress.finetune.progress import Progress

Calls = list[tuple[Any, ...]]


def record_calls(calls: Calls, name: str, result: Any = None) -> Any:
    """A function that notes how it was called."""

    def call(*args: Any, **values: Any) -> Any:
        calls.append((name, *args, values))
        return result

    return call


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=rf"legocompress\[{name}\]"):
        open_logger(name, tmp_path, {})


def test_a_tracker_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="allowed are tensorboard, wandb, mlflow"):
        open_logger("csv", tmp_path, {})


def test_tensorboard(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = open_logger("tensorboard", tmp_path / "run", {})
    assert not (tmp_path / "run").exists()  # the run makes its folder
    logger.log(1, {"train/loss": 2.0})
    logger.log(2, {"train/loss": 1.5})
    logger.close()
    found = events.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [(1, 2.0), (2, 1.5)]


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Calls = []
    run = SimpleNamespace(log=record_calls(calls, "log"), finish=record_calls(calls, "finish"))
    library = SimpleNamespace(init=record_calls(calls, "init", run))
    monkeypatch.setitem(sys.modules, "wandb", library)  # type: ignore[arg-type]
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    logger = open_logger("wandb", tmp_path / "run", {"recipe": "demo"})
    assert calls == []
    logger.log(3, {"eval/top1": 90.0})
    logger.close()
    logger.close()
    (_, options), *rest = calls
    assert options == {
        "project": "legocompress", "name": "run", "dir": str(tmp_path / "run"),
        "config": {"recipe": "demo"},
    }  # fmt: skip
    assert rest == [("log", {"eval/top1": 90.0}, {"step": 3}), ("finish", {})]


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Calls = []
    names = ("start_run", "log_params", "log_metrics", "end_run")
    library = SimpleNamespace(**{name: record_calls(calls, name, name) for name in names})
    monkeypatch.setitem(sys.modules, "mlflow", library)  # type: ignore[arg-type]
    logger = open_logger("mlflow", tmp_path / "run", {"workers": 2})
    logger.close()
    assert calls == []  # nothing was logged, so no run was started
    logger.log(1, {"train/loss": 1.0})
    logger.close()
    assert calls == [
        ("start_run", {"run_name": "run"}),
        ("log_params", {"workers": "2"}, {}),
        ("log_metrics", {"train/loss": 1.0}, {"step": 1}),
        ("end_run", {}),
    ]


def test_json_lines() -> None:
    stream = io.StringIO()
    log = JsonLines(stream)
    log.write("progress", task="layers", done=1, total=None)
    log.log(2, {"train/loss": 0.5})
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first.pop("time") <= second.pop("time")
    assert first == {"event": "progress", "task": "layers", "done": 1, "total": None}
    assert second == {"event": "metrics", "step": 2, "metrics": {"train/loss": 0.5}}


def test_json_lines_on_a_full_disk() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    stream = open("/dev/full", "w")  # noqa: SIM115 closing it fails again
    with pytest.raises(OutputError, match=r"cannot be written: .*No space left"):
        JsonLines(stream).write("start")
    with contextlib.suppress(OSError):
        stream.close()


def test_the_numbers_of_an_epoch_leave_out_what_was_not_measured() -> None:
    progress = Progress(1, 2, 5, 5, 0.5, None, 10.0, 7, 0.1)
    assert Epoch(progress, None, None, 88.0, True).metrics() == {
        "train/loss": 0.5, "train/lr": 0.1, "train/index_changes": 7, "eval/agreement": 88.0
    }  # fmt: skip
