"""How calibrated Lego filters compare with other methods at the same stored bytes or MACs.

    python -m benchmarks.calibration_rivals --data-dir fashion-mnist --network shipped --threads 1

Claim: at equal MACs, Lego filters lose less accuracy than truncated SVD, Tucker-2 and pruning, all
repaired with the same unlabelled images of Fashion-MNIST. Prints the points lost by each rival and
by ours; exit status 1 where a rival is ahead at equal MACs. Ours have one m and o for all layers,
and those of each layer within the same bytes or MACs. Takes tens of minutes per setting and seed.
Needs `pip install 'legocompress[bench]'`. Rows are appended to --out and not measured again.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from functools import partial

import torch

import legocompress as lego
from benchmarks.common.arguments import Setting
from benchmarks.common.calibration_runs import (
    TaskOpener,
    group_rows,
    list_runs,
    make_fashion_parser,
    make_task_opener,
    measure_ours,
)
from benchmarks.common.results import Results, Row
from benchmarks.common.sizing import SIZINGS
from benchmarks.common.tables import format_range
from benchmarks.rivals.costs import COSTS
from benchmarks.rivals.repair import METHODS, PACKAGES, Repair, compress, list_planned
from legocompress.calibrate.joint import RATES


def require_packages(methods: list[str]) -> None:
    """End the script with advice where a method needs a package that is not installed."""
    for method in methods:
        package = PACKAGES.get(method)
        if package and importlib.util.find_spec(package) is None:
            sys.exit(
                f"{method} needs the package {package}: pip install 'legocompress[bench]', or "
                f"leave it out with --method {' '.join(m for m in methods if m != method)}"
            )


def compress_task(options: argparse.Namespace, task_opener: TaskOpener, key: Row, ours: Row) -> Row:
    """Compress the network of a key by a rival at the costs of our row; its accuracy and facts."""
    target = task_opener(key["network"])
    spec = lego.LegoSpec(m=ours["m"], o=ours["o"], k=ours["k"])
    budget = None if key["budget"] == "none" else (key["budget"], ours[key["budget"]])
    try:
        network, facts = compress(
            key["method"],
            target.network,
            list_planned(target.network, spec),
            target.draw_images(options.images, key["seed"]),
            budget,
            Repair(options.epochs, key["seed"], options.rates),
        )
    except ValueError as error:
        return {"fault": str(error)}
    return {"accuracy": target.measure_accuracy(network), **facts}


def measure_rival(
    results: Results, options: argparse.Namespace, task_opener: TaskOpener, key: Row, ours: Row
) -> Row:
    """The row of one rival, measured where it is missing; palettes are alike for all settings."""
    if key["budget"] == "none":
        shown = {name: value for name, value in key.items() if name not in ("m", "o", "k")}
    else:
        shown = key
    return results.measure(
        {"table": "rivals", "rates": list(options.rates), **shown},
        partial(compress_task, options, task_opener, key, ours),
    )


def measure_all(results: Results, options: argparse.Namespace) -> None:
    """Measure ours and every rival for each run."""
    task_opener = make_task_opener(options)
    for run in list_runs(options):
        uniform = measure_ours(results, options, task_opener, run, "uniform")
        for kind in options.budget:
            measure_ours(results, options, task_opener, run, kind)
        for method in options.method:
            for kind in ("none",) if method == "palette" else options.budget:
                key = {**run[0], "method": method, "budget": kind}
                measure_rival(results, options, task_opener, key, uniform)


def select_rival(
    results: Results, options: argparse.Namespace, network: str, setting: Setting, kind: str
) -> dict[str, list[Row]]:
    """Rows of each method at one budget."""
    m, o, k = setting
    place: Row = {} if kind == "none" else {"m": m, "o": o, "k": k}
    key = {"network": network, "budget": kind, "images": options.images, "epochs": options.epochs}
    return {
        method: [
            row
            for row in results.select(table="rivals", method=method, **key, **place)
            if row["rates"] == list(options.rates)
        ]
        for method in METHODS
    }


def print_table(results: Results, options: argparse.Namespace) -> bool:
    """Print one line per rival; returns whether ours, by layer, lead at equal MACs."""
    good = True
    print("\nAccuracy lost against dense, in points; size and MACs as multiples of ours")
    head = f"{'lost':>24s} {'ours lost':>24s} {'ahead by':>8s} {'bytes':>6s} {'MACs':>6s}"
    print(
        f"{'network':8s} {'m, o, k':11s} {'ours':7s} {'equal':5s} {'rival':8s} {'seeds':>5s} {head}"
    )
    for network, (m, o, k), sizing, ours in group_rows(results, options, SIZINGS):
        ours_by_seed = {row["seed"]: row for row in ours}
        for kind in ("bytes", "macs", "none"):
            if sizing not in ("uniform", kind):
                continue
            for method, all_rows in select_rival(
                results, options, network, (m, o, k), kind
            ).items():
                rows = [row for row in all_rows if row["seed"] in ours_by_seed]
                setting = f"{network:8s} {f'{m}, {o}, {k}':11s} {sizing:7s}"
                start = f"{setting} {kind:5s} {method:8s} {len(rows):5d}"
                if any("fault" in row for row in rows):
                    print(f"{start} cannot: {rows[0].get('fault', 'with some seed')}")
                elif rows:
                    ahead = print_rival(start, rows, ours_by_seed)
                    good &= ahead or kind != "macs" or sizing == "uniform"
    print("palette: 16 values per layer, whatever our size; as many MACs as dense at any size.")
    return good


def print_rival(start: str, rows: list[Row], ours: dict[int, Row]) -> bool:
    """Print one line; returns whether ours lose less on average."""
    pairs = [(row, ours[row["seed"]]) for row in rows]
    rival_lost = [mine["dense"] - row["accuracy"] for row, mine in pairs]
    lost = [mine["dense"] - mine["calibrated"] for _, mine in pairs]
    ahead = statistics.fmean(rival_lost) - statistics.fmean(lost)
    sizes = [
        statistics.fmean(row[kind] / mine[kind] for row, mine in pairs)
        for kind in ("bytes", "macs")
    ]
    numbers = " ".join(f"{size:6.2f}" for size in sizes)
    print(
        f"{start} {format_range(rival_lost):>24s} {format_range(lost):>24s} {ahead:+8.2f} {numbers}"
    )
    return ahead > 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = make_fashion_parser(__doc__)
    parser.add_argument("--method", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--budget", nargs="+", choices=COSTS, default=list(COSTS))
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="of tuning")
    return parser.parse_args()


def main() -> int:
    """Measure what is missing and print the table; returns 1 where a rival leads at equal MACs."""
    options = parse_arguments()
    require_packages(options.method)
    torch.set_num_threads(options.threads)
    results = Results(options.out)
    measure_all(results, options)
    return 0 if print_table(results, options) else 1


if __name__ == "__main__":
    sys.exit(main())
