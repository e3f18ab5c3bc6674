"""Lines of the tables that benchmarks print."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any


def format_head(columns: Sequence[str]) -> str:
    """The two first lines of a Markdown table."""
    return f"{format_row(columns)}\n|{'---|' * len(columns)}"


def format_row(cells: Iterable[Any]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def format_range(values: Sequence[float]) -> str:
    """Mean, minimum and maximum."""
    return f"{statistics.fmean(values):6.2f} ({min(values):.2f} to {max(values):.2f})"


def print_checks(checks: Sequence[tuple[str, bool]], indent: str = "") -> bool:
    """Print one line per target, whether it holds or is missed; returns whether all hold."""
    for text, holds in checks:
        print(f"{indent}{'holds ' if holds else 'MISSED'} {text}")
    return all(holds for _, holds in checks)
