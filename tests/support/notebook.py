"""Runs a notebook without Jupyter: the code cells, one after another, in one fresh process.

    python -m tests.support.notebook docs/tutorial.ipynb

stores in the notebook what its cells print.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Prints the outputs of all cells as one line of JSON, after whatever else goes to standard output.
RUN_CELLS = """
import contextlib, io, json, sys
namespace = {"__name__": "__main__"}
outputs = []
for number, source in enumerate(json.load(sys.stdin), 1):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, f"cell {number}", "exec"), namespace)
    outputs.append(printed.getvalue())
print(json.dumps(outputs))
"""


def read_notebook(path: Path) -> dict[str, Any]:
    """Read a notebook of format 4."""
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return notebook


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells that hold code, in order."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_cells(notebook: dict[str, Any], folder: Path) -> list[str]:
    """Run all code cells in `folder`, and return what each of them prints.

    Raises:
        AssertionError: a cell raised an exception; the message holds its traceback.
    """
    done = subprocess.run(
        [sys.executable, "-c", RUN_CELLS],
        input=json.dumps(["".join(cell["source"]) for cell in code_cells(notebook)]),
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    outputs: list[str] = json.loads(done.stdout.splitlines()[-1])
    return outputs


def printed_text(cell: dict[str, Any]) -> str:
    """What a stored cell has printed."""
    return "".join(line for output in cell["outputs"] for line in output["text"])


def store_outputs(path: Path) -> None:
    """Run a notebook in a temporary folder and write it back with the printed text."""
    notebook = read_notebook(path)
    with tempfile.TemporaryDirectory() as folder:
        outputs = run_cells(notebook, Path(folder))
    for number, (cell, text) in enumerate(zip(code_cells(notebook), outputs, strict=True), 1):
        lines = text.splitlines(keepends=True)
        stream = {"name": "stdout", "output_type": "stream", "text": lines}
        cell["outputs"] = [stream] if lines else []
        cell["execution_count"] = number
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    store_outputs(Path(sys.argv[1]))
