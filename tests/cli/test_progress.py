"""Bars write to the log of the command, on a terminal or not."""

from __future__ import annotations

import io
import json

import pytest
from legocompress_cli import progress
from legocompress_cli.progress import LoggedProgress

from legocompress.finetune.loggers import JsonLines


def test_lines_are_a_second_apart_but_the_last_is_always_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([0.0, 0.4, 0.9, 1.5, 1.6, 1.7])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    bar = LoggedProgress(JsonLines(stream), disable=True)
    monkeypatch.setattr(bar, "get_time", lambda: 0.0)
    task = bar.add_task("layers", total=6)
    for _ in range(6):
        bar.advance(task)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["done"] for line in lines] == [1, 4, 6]
    assert {(line["event"], line["task"], line["total"]) for line in lines} == {
        ("progress", "layers", 6)
    }


def test_without_a_log_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar(quiet=True) as bar:
        bar.update(bar.add_task("layers", total=2), completed=2)
    with progress.activity_bar("writing"):
        pass
    assert capsys.readouterr() == ("", "")
