"""The progress bar of long commands."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)


def progress_bar(quiet: bool = False, *details: ProgressColumn) -> Progress:
    """A bar with the estimated time left, on standard error.

    It shows nothing if `quiet`, or if standard error is not a terminal.

    Args:
        quiet: show nothing.
        details: further columns, before the time left.
    """
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *details,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
