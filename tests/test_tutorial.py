"""The tutorial notebook runs, and holds what it prints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.notebook import code_cells, printed_text, read_notebook, run_cells, store_outputs

TUTORIAL = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"


def make_notebook(*sources: str) -> dict[str, Any]:
    cells = [{"cell_type": "markdown", "source": ["text"]}]
    cells += [{"cell_type": "code", "source": [source], "outputs": []} for source in sources]
    return {"cells": cells, "nbformat": 4}


def words(text: str) -> list[str]:
    """The words without numbers, which differ a little from machine to machine."""
    return re.findall(r"[A-Za-z_-]+", text)


@pytest.mark.slow
def test_the_tutorial_prints_what_it_holds(tmp_path: Path) -> None:
    notebook = read_notebook(TUTORIAL)
    printed = run_cells(notebook, tmp_path)
    stored = [printed_text(cell) for cell in code_cells(notebook)]
    assert [words(text) for text in printed] == [words(text) for text in stored]
    (comparison,) = (text for text in printed if "calibrated " in text)
    rows = re.findall(r"^(\w+) +([\d.]+)%", comparison, re.MULTILINE)
    top1 = {name: float(value) for name, value in rows}
    assert top1["dense"] > 93
    assert top1["clustered"] < 75
    assert top1["calibrated"] > 88


def test_the_stored_tutorial_is_small_and_was_run_in_order() -> None:
    cells = code_cells(read_notebook(TUTORIAL))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(printed_text(cell) for cell in cells)
    assert TUTORIAL.stat().st_size < 20_000


def test_cells_share_their_names_and_run_in_the_folder(tmp_path: Path) -> None:
    notebook = make_notebook("x = 2", "print(x + 1)\nopen('file', 'w').write('text')")
    assert run_cells(notebook, tmp_path) == ["", "3\n"]
    assert (tmp_path / "file").read_text() == "text"


def test_a_cell_that_raises_is_named_with_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r'"cell 2"[\s\S]*ZeroDivisionError'):
        run_cells(make_notebook("x = 0", "1 / x"), tmp_path)


def test_stored_outputs_are_what_the_cells_print(tmp_path: Path) -> None:
    path = tmp_path / "small.ipynb"
    path.write_text(json.dumps(make_notebook("x = 1", "print(x)\nprint('end')")))
    store_outputs(path)
    silent, speaking = code_cells(read_notebook(path))
    assert silent["outputs"] == []
    assert printed_text(speaking) == "1\nend\n"
    assert speaking["execution_count"] == 2
