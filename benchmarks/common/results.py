"""Rows of results in a file of JSON lines, and clocks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """All rows of a file of JSON lines; none where the file does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_row(path: Path, row: Row) -> None:
    """Write one row at the end of a file."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


class Results:
    """Rows in a file of JSON lines; a row that is there is not measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = read_rows(path)

    def select(self, **key: Any) -> list[Row]:
        """Rows with these values."""
        return [row for row in self.rows if key.items() <= row.items()]

    def measure(self, key: Row, run: Callable[[], Row]) -> Row:
        """The row of this key, which is measured and written where it is missing."""
        earlier = self.select(**key)
        if earlier:
            return earlier[0]
        row = {**key, **run()}
        self.rows.append(row)
        append_row(self.path, row)
        shown = {k: v for k, v in row.items() if k not in ("layers", "table")}
        print(" ".join(f"{k}={v}" for k, v in shown.items()), flush=True)
        return row


class Clock:
    """Seconds of wall clock and of CPU time since it was made."""

    def __init__(self) -> None:
        self.started = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Both, as `seconds` and `cpu_seconds`."""
        now = time.perf_counter(), time.process_time()
        pairs = zip(("seconds", "cpu_seconds"), now, self.started, strict=True)
        return {name: after - before for name, after, before in pairs}
