"""The command line as a whole: help, and how every error ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from legocompress_cli.main import cli

import legocompress as lego
from tests.support.command_line import DEMO, DENSE, SAMPLE, Ran, Run, check_error, list_files


@pytest.mark.parametrize(
    "command",
    ["", "convert", "inspect", "calibrate", "finetune", "recipes", "report", "evaluate",
     "compare", "benchmark", "export", "push", "demo"],
)  # fmt: skip
def test_every_command_has_help(command: str) -> None:
    words = [command] if command else []
    for flag in ("--help", "-h"):
        result = CliRunner().invoke(cli, [*words, flag])
        assert result.exit_code == 0
        assert result.output.startswith("Usage: ")
        options = cli.commands[command].params if command else cli.params
        for option in options:
            if option.param_type_name == "option":
                assert option.opts[0] in result.output
                assert option.help, f"{command} {option.opts}"
    if not command:
        assert {"convert", "inspect", "report", "evaluate", "export", "push", "demo"} <= set(
            re.findall(r"^  (\w+) ", result.output, re.MULTILINE)
        )


def test_without_arguments_the_main_job_comes_before_the_commands(run: Run) -> None:
    ran = run()
    assert (ran.code, ran.err) == (0, "")
    job, commands = ran.out.index("The main job:"), ran.out.index("Compress:")
    assert job < commands < ran.out.index("Use elsewhere:")
    lines = re.findall(r"^  legocompress (\w+)", ran.out[job:commands], re.MULTILINE)
    assert lines == ["convert", "report", "finetune", "benchmark", "export"]
    listed = re.findall(r"^  (\w+)  ", ran.out[commands:], re.MULTILINE)
    assert listed.index("convert") < listed.index("calibrate") < listed.index("report")
    assert {*listed, "demo"} >= cli.commands.keys()


def test_version(run: Run) -> None:
    assert lego.__version__ in run("--version").out


@pytest.fixture
def broken(tmp_path: Path, compressed_folder: Path) -> Path:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_bytes((compressed_folder / "config.json").read_bytes())
    raw = (compressed_folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:5000])
    return folder


@pytest.mark.parametrize("command", ["report", "export", "convert", "inspect", "evaluate"])
def test_a_truncated_folder(run: Run, tmp_path: Path, broken: Path, command: str) -> None:
    before = list_files(tmp_path)
    extra = ["--data", SAMPLE] if command == "evaluate" else []
    check_error(run(command, broken, *extra), 1, "model.safetensors", "damaged")
    assert list_files(tmp_path) == before


def test_folders_that_are_not_compressed_folders(run: Run, tmp_path: Path) -> None:
    for command in ("report", "export"):
        check_error(run(command, "nowhere"), 1, "'nowhere' is not a compressed folder")
        check_error(run(command, DEMO / "fashion-resnet"), 1, "no compression_config")
    assert list_files(tmp_path) == set()


def test_usage_errors_of_click(run: Run) -> None:
    for words in (["convert"], ["convert", DENSE, "--no-such"], ["no-such"],
                  ["convert", DENSE, "--m", "x"], ["evaluate", DENSE]):  # fmt: skip
        ran = run(*words)
        assert ran.code == 2
        assert ran.out == ""
        assert ran.err.splitlines()[-1].startswith("Error: ")
        assert "Traceback" not in ran.err


def test_debug_shows_the_traceback(run: Run) -> None:
    with pytest.raises(lego.LegoError, match="m=0"):
        run("--debug", "inspect", DENSE, "--m", "0")


COMMAND = [sys.executable, "-c", "from legocompress_cli.main import main; main()"]


@pytest.mark.slow
def test_the_exit_code_of_the_process(tmp_path: Path) -> None:
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
    check_error(Ran(ran.returncode, ran.stdout, ran.stderr), 2, "m=0")


@pytest.mark.slow
def test_a_closed_pipe_causes_no_traceback(tmp_path: Path) -> None:
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


# A shell starts its background jobs with interrupts ignored, and these tests may be one.
START_WITH_INTERRUPTS = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from legocompress_cli.main import main
print("ready", flush=True)
main()
"""


@pytest.mark.slow
def test_an_interrupt_leaves_no_files(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", START_WITH_INTERRUPTS, "convert", "resnet50", "--no-pretrained",
         "--k", "4", "--out", "out"],
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
