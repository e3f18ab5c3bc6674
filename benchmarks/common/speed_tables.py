"""The two tables of docs/performance.md: speed of networks, and what their time is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.common.merges import PAPER
from benchmarks.common.results import Row
from benchmarks.common.tables import format_head, format_row

KEY = ("network", "setting", "batch", "threads")
OURS = ("own Winograd", "deployed dense")


def sort_rows(rows: list[Row]) -> list[Row]:
    """Rows by network, setting, batch and threads."""
    return sorted(rows, key=lambda row: tuple(str(row[name]) for name in KEY))


def format_speeds(rows: list[Row]) -> str:
    """One line per row: measured ratio, its spread, theory, and what the other forms reach."""
    columns = [
        *KEY,
        "Lego",
        "Lego, over the fastest that is not our own",
        "spread",
        "fastest quarter",
        "theory, all filters",
        "theory, used ones",
        "fastest dense, fp32",
        "slowest layer",
        "layers < 1",
        "peak memory, of the least dense",
        "embedding_bag",
        "index_select",
        "1x1 merge",
        "own dense Winograd",
    ]
    lines = [format_head(columns)]
    lines += [format_row(list_cells(row)) for row in sort_rows(rows)]
    return "\n".join(lines)


def list_cells(row: Row) -> list[Any]:
    """The cells of one row in the table of `format_speeds`."""
    run = row["run"]
    forms = {form["form"]: form for form in run["forms"]}
    dense = {n: f for n, f in forms.items() if n != "lego" and not n.startswith("merge:")}
    others = min(form["median_ms"] for name, form in dense.items() if name not in OURS)
    least = min((f["peak_bytes"] for f in dense.values() if f["peak_bytes"]), default=None)
    ratios = [layer["ratio"] for layer in run["layers"]]
    peaks = forms["lego"]["peak_bytes"], least
    quarter = min(form["quartiles_ms"][0] for form in dense.values())
    compared = ("merge: embedding_bag", "merge: index_select", PAPER, "own Winograd")
    return [
        row["network"],
        row["setting"],
        run["batch"],
        run["threads"],
        f"**{run['ratio']:.2f}**",
        f"{others / forms['lego']['median_ms']:.2f}",
        f"{100 * forms['lego']['spread']:.0f} %",
        f"{quarter / forms['lego']['quartiles_ms'][0]:.2f}",
        f"{run['bound']:.2f}",
        f"{run['bound_used']:.2f}",
        run["fastest_fp32"],
        f"{min(ratios):.2f}",
        f"{sum(r < 1 for r in ratios)} of {len(ratios)}",
        f"{peaks[0] / peaks[1]:.2f}" if all(peaks) else "?",
        *(f"{forms[name]['ratio']:.2f}" if name in forms else "" for name in compared),
    ]


def format_shares(rows: list[Row]) -> str:
    """One line per row and kind of layer: its share of the network's time, and its speed."""
    columns = [*KEY, "layers", "share of the time", "speed", "theory, used ones"]
    lines = [format_head(columns)]
    for row in sort_rows(rows):
        for cells in list_shares(row["run"]):
            lines.append(format_row([*(row[name] for name in KEY), *cells]))
    return "\n".join(lines)


def list_shares(run: Row) -> Iterator[list[str]]:
    """Cells of each kind of layer of one run, and of the rest of the network."""
    layers = run["layers"]
    total = next(form["median_ms"] for form in run["forms"] if form["form"] == "lego")
    kinds: dict[str, list[Row]] = {}
    for layer in layers:
        words = [word for word in layer["name"].split(".") if not word.isdigit()]
        kinds.setdefault(words[-1], []).append(layer)
    for kind, some in kinds.items():
        ours, dense = (sum(layer[key] for layer in some) for key in ("ms", "dense_ms"))
        theory = dense / sum(layer["dense_ms"] / layer["bound_used"] for layer in some)
        numbers = [f"{100 * ours / total:.0f} %", f"{dense / ours:.2f}", f"{theory:.2f}"]
        yield [f"{len(some)} x {kind}", *numbers]
    rest = 1 - sum(layer["ms"] for layer in layers) / total
    yield ["all else", f"{100 * rest:.0f} %", "", ""]
