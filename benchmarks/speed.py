"""How fast deployed Lego networks are against the fastest dense forms in fp32.

    python -m benchmarks.speed --cache DIR --results speed.jsonl --network resnet50 --threads 1
    python -m benchmarks.speed --results speed.jsonl --table

Claim: wall clock follows theory: the speed over the fastest dense form in fp32 is close to the
ratio of MACs. Prints both, with spread, memory and the merges of plain operators beside the kernel,
and then what the time is made of. Takes two to five minutes per cell (network, setting, batch,
threads), each in interleaved runs in this process. Cells in --results are not measured again.

Networks are torchvision's at 224, with random weights: time does not depend on the values, but
which Lego filters are used does, so the filters are clustered as usual and stored in --cache.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path

from torch import nn

import legocompress as lego
from benchmarks.common.arguments import make_parser
from benchmarks.common.merges import list_merges
from benchmarks.common.results import append_row, read_rows
from benchmarks.common.speed_tables import KEY, format_shares, format_speeds
from legocompress.report.rivals import AGAINST, torch_forms

NETWORKS = ("resnet50", "vgg16_bn", "mobilenet_v2")
SETTINGS = {
    "m0.5-o2": (0.5, 2, 1),
    "m0.25-o4": (0.25, 4, 1),
    "m0.5-o2-k4": (0.5, 2, 4),
    "m0.25-o4-k4": (0.25, 4, 4),
}

Cell = tuple[str, str, int, int]  # as KEY


def open_compressed(network: str, setting: str, cache: Path) -> nn.Module:
    """The network at a setting; it is clustered once and stored in the cache."""
    folder = cache / f"{network}-{setting}"
    if not folder.exists():
        m, o, k = SETTINGS[setting]
        model = lego.create(f"torchvision/{network}", pretrained=False)
        lego.convert_(model, lego.plan(model, lego.LegoSpec(m=m, o=o, k=k)))
        lego.save(model, folder)
    return lego.load(folder)


def print_form(form: str) -> None:
    """Print the form that is timed next, with the time of day."""
    print(f"  {time.strftime('%X')} {form}", flush=True)


def measure_cell(model: nn.Module, cell: Cell, args: argparse.Namespace) -> None:
    """Time a network in all forms and write the row."""
    _, _, batch, threads = cell
    run = lego.benchmark(
        model,
        batch,
        threads,
        tuple(args.against),
        args.rounds,
        args.seconds,
        also=list_merges,
        on_form=print_form,
    )
    append_row(args.results, {**dict(zip(KEY, cell, strict=True)), "run": run.to_dict()})
    shown = {form.form: round(form.ratio, 3) for form in run.forms}
    slow = statistics.median(layer.ratio for layer in run.layers)
    print(cell, f"{run.ratio:.3f} of {run.bound:.2f}, {run.bound_used:.2f}", shown, flush=True)
    print("  median layer", round(slow, 2), "left out:", run.left_out, flush=True)


def print_tables(results: Path) -> None:
    """Print the tables of the latest row of each cell."""
    latest = list({tuple(row[name] for name in KEY): row for row in read_rows(results)}.values())
    print(format_speeds(latest), format_shares(latest), sep="\n\n")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--cache", type=Path, default=Path("speed-cache"), help="folder of networks"
    )
    parser.add_argument("--results", type=Path, default=Path("speed.jsonl"), help="file of rows")
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--setting", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--against", nargs="*", choices=AGAINST, default=list(AGAINST))
    parser.add_argument("--compile-seconds", type=int, default=240, help="limit of torch.compile")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--convert", action="store_true", help="fill the cache and stop")
    parser.add_argument("--again", action="store_true", help="measure cells that are there, too")
    parser.add_argument("--table", action="store_true", help="only print the tables of --results")
    return parser.parse_args()


def main() -> None:
    """Measure what is missing and print the tables."""
    args = parse_arguments()
    torch_forms.COMPILE_SECONDS = args.compile_seconds
    done = {tuple(row[name] for name in KEY) for row in read_rows(args.results)}
    cells = itertools.product(args.network, args.setting, args.batch, args.threads)
    for cell in [] if args.table else cells:
        if cell in done and not args.again:
            continue
        model = open_compressed(cell[0], cell[1], args.cache)
        if not args.convert:
            measure_cell(model, cell, args)
    if not args.convert:
        print_tables(args.results)


if __name__ == "__main__":
    main()
