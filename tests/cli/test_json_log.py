"""`--log-json` writes where a command is, line by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import ALL, PHOTOS, SMALL, Run, check_error

CONVERT = ["convert", *SMALL, ALL, "--only", "layer4.*", "--only", "layer3.0.conv2"]


def read_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_file_gets_the_steps_of_a_conversion(run: Run, tmp_path: Path) -> None:
    ran = run(*CONVERT, "--log-json", "log.jsonl")
    assert ran.code == 0, ran.err
    start, *steps = read_lines((tmp_path / "log.jsonl").read_text())
    assert (start["event"], start["command"]) == ("start", "convert")
    clustering = [step for step in steps if step["task"] == "clustering"]
    assert clustering[-1]["done"] == clustering[-1]["total"] > 0
    assert clustering[-1]["seconds_left"] is None


def test_standard_output_holds_the_lines_alone(run: Run) -> None:
    ran = run(*CONVERT, "--log-json", "-")
    assert ran.code == 0
    assert {line["event"] for line in read_lines(ran.out)} == {"start", "progress"}
    assert "layers converted" in ran.err


def test_a_second_run_appends(run: Run, tmp_path: Path) -> None:
    for _ in range(2):
        run("calibrate", "nowhere", "--data", PHOTOS, "--log-json", "log.jsonl")
    lines = read_lines((tmp_path / "log.jsonl").read_text())
    assert [line["command"] for line in lines] == ["calibrate", "calibrate"]


def test_of_several_processes_only_the_first_writes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run("calibrate", "nowhere", "--data", PHOTOS, "--log-json", "log.jsonl").code == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["no/such/folder/log.jsonl", "."])
def test_a_file_that_cannot_be_written(run: Run, tmp_path: Path, path: str) -> None:
    check_error(run(*CONVERT, "--log-json", path), 1, "--log-json", "cannot be written")
    assert list(tmp_path.iterdir()) == []
