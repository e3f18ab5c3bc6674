"""What the tests of all commands share: a way to run them, and a compressed network."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from legocompress_cli.main import main

import legocompress as lego
from tests.support.command_line import DENSE, Ran, Run


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command in this process, as its script would, in an empty folder."""
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


@pytest.fixture(scope="session")
def compressed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo network, converted and saved by the library."""
    model = lego.create(DENSE)
    lego.convert_(model, lego.plan(model, lego.LegoSpec(m=0.5, o=2, k=2)))
    return lego.save(model, tmp_path_factory.mktemp("compressed") / "fashion-lego")
