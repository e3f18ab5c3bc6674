"""The progress of long commands: a bar on standard error, and lines of `--log-json`."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from legocompress.finetune.loggers import JsonLines

from .json_log import current_log

SECONDS_BETWEEN_LINES = 1.0


class LoggedProgress(Progress):
    """A progress bar that also writes where its tasks are to a log of JSON lines.

    Args:
        log: where to write; None for nowhere.
        columns: what the bar shows.
        values: further arguments of the bar.
    """

    def __init__(self, log: JsonLines | None, *columns: ProgressColumn, **values: Any) -> None:
        self.log_lines = log
        self._next_line: dict[TaskID, float] = {}
        super().__init__(*columns, **values)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Move a task on by a number of units."""
        super().advance(task_id, advance)
        self._write_line(task_id)

    def update(self, task_id: TaskID, *args: Any, **values: Any) -> None:
        """Change what is known of a task."""
        super().update(task_id, *args, **values)
        self._write_line(task_id)

    def _write_line(self, task_id: TaskID) -> None:
        """Write a line if the task is done, or its last line is a second old."""
        if self.log_lines is None:
            return
        task = next(task for task in self.tasks if task.id == task_id)
        now = time.monotonic()
        if not task.finished and now < self._next_line.get(task_id, 0.0):
            return
        self._next_line[task_id] = now + SECONDS_BETWEEN_LINES
        self.log_lines.write(
            "progress",
            task=task.description,
            done=task.completed,
            total=task.total,
            seconds_left=None if task.finished else task.time_remaining,
        )


def progress_bar(quiet: bool = False, *details: ProgressColumn) -> LoggedProgress:
    """A bar with the estimated time left, on standard error.

    It shows nothing if `quiet`, or if standard error is not a terminal. Lines for `--log-json` are
    written in any case.

    Args:
        quiet: show nothing.
        details: further columns, before the time left.
    """
    console = Console(stderr=True)
    return LoggedProgress(
        current_log(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *details,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )


def activity_bar(description: str, quiet: bool = False) -> LoggedProgress:
    """A moving bar with the time so far, for a step whose length is unknown.

    Args:
        description: what the step does.
        quiet: show nothing.
    """
    console = Console(stderr=True)
    bar = LoggedProgress(
        current_log(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
    bar.update(bar.add_task(description, total=None))
    return bar
