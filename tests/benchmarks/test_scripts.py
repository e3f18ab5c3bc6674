"""Every benchmark explains itself, and the list of them is complete."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_gives_the_claim_and_the_command(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"python -m benchmarks.{name}" in text
    assert "Claim: " in text
    assert "Takes " in text


def test_the_list_of_benchmarks_is_complete() -> None:
    text = (FOLDER / "README.md").read_text()
    listed = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert sorted(listed) == SCRIPTS
