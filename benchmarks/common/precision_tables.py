"""The table and the plot of the forms in several precisions: speed, bytes and loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common.results import Row
from benchmarks.common.tables import format_head, format_row


def format_table(rows: list[Row]) -> str:
    """One line per row, with one column of speed per batch and number of threads."""
    cells = sorted({cell for row in rows for cell in row["cells"]})
    speeds = ["speed, batch {}, {} thread(s)".format(*cell.split("x")) for cell in cells]
    columns = [
        "network",
        "form",
        *speeds,
        "MB",
        "agreement",
        "output error",
        "top-1",
        "of original",
    ]
    lines = [format_head(columns)]
    for row in rows:
        lines.append(
            format_row(
                [
                    row["network"],
                    row["form"],
                    *(format_speed(row["cells"].get(cell)) for cell in cells),
                    "" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f}",
                    *(
                        format_number(row.get(name), unit)
                        for name, unit in (
                            ("agreement", " %"),
                            ("output_error", ""),
                            ("top1", " %"),
                            ("original_top1", " %"),
                        )
                    ),
                ]
            )
        )
    return "\n".join(lines)


def format_speed(cell: dict[str, float] | None) -> str:
    """The ratio and the spread of one cell."""
    return "" if cell is None else f"{cell['ratio']:.2f}x ({100 * cell['spread']:.0f} %)"


def format_number(value: float | None, unit: str) -> str:
    """A percentage with one digit, another number with three; nothing for None."""
    if value is None:
        return ""
    return f"{value:.1f}{unit}" if unit else f"{value:.3f}"


def find_frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both coordinates, by falling first coordinate."""
    frontier: list[tuple[float, float]] = []
    for point in sorted(points, reverse=True):
        if not frontier or point[1] > frontier[-1][1]:
            frontier.append(point)
    return frontier


def save_plot(rows: list[Row], path: Path) -> None:
    """Draw agreement over speed, one panel per network, with the frontier of the best forms."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    judged = [row for row in rows if row.get("agreement") is not None]
    networks = list(dict.fromkeys(row["network"] for row in judged))
    figure, panels = pyplot.subplots(
        1, max(1, len(networks)), figsize=(5 * max(1, len(networks)), 4), squeeze=False
    )
    # Without any network there is one empty panel.
    for panel, network in zip(panels[0], networks, strict=False):
        draw_panel(panel, network, [row for row in judged if row["network"] == network])
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def draw_panel(panel: Any, network: str, rows: list[Row]) -> None:
    """Draw the forms of one network at the first of its batches and threads."""
    points = {}
    for row in rows:
        cell = next(iter(row["cells"].values()))
        points[row["form"]] = cell["ratio"], row["agreement"]
    for form, (speed, agreement) in points.items():
        panel.plot(
            speed, agreement, "o", color="tab:red" if form.startswith("Lego") else "tab:blue"
        )
        panel.annotate(
            form, (speed, agreement), fontsize=7, xytext=(3, 3), textcoords="offset points"
        )
    panel.plot(*zip(*find_frontier(list(points.values())), strict=True), color="grey", linewidth=1)
    panel.set_title(network)
    panel.set_xlabel("speed over OpenVINO in fp32")
    panel.set_ylabel("agreement with the original, %")
