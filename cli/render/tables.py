"""Tables on the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

# All other columns hold numbers and are aligned right.
TEXT_COLUMNS = ("layer", "weight", "network", "note", "stays dense because", "form", "route")
PIPE_WIDTH = 400  # characters; enough for every row, so that files and pipes get unwrapped lines


def print_table(columns: list[str], rows: list[list[str]], totals: list[str] | None = None) -> None:
    """Print a table, with a last row of totals if given.

    Args:
        columns: the columns' names.
        rows: one text per column in each row.
        totals: one text per column.
    """
    table = Table(
        show_footer=totals is not None, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for position, name in enumerate(columns):
        table.add_column(
            name,
            footer="" if totals is None else totals[position],
            justify="left" if name in TEXT_COLUMNS else "right",
            overflow="fold",
        )
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPE_WIDTH)
    console.print(table)
