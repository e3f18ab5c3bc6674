"""How long ResNet-50 takes to convert and calibrate, and how much memory.

    python -m benchmarks.calibration_resnet50 --weights resnet50_embed768.safetensors \\
        --photos photos --threads 2

Claim: at m=0.5 o=2 k=4, with 256 views of photos at 224, on two cores, at most 900 s and 4 GiB.
Prints whether both targets hold; exit status 1 where one is missed. Takes about 15 minutes. Rows
are appended to --out and not measured again.
"""

from __future__ import annotations

import argparse
import copy
import resource
import sys
from functools import partial

import torch

import legocompress as lego
from benchmarks.common.arguments import (
    add_photo_folder,
    add_run_arguments,
    make_parser,
    parse_file,
)
from benchmarks.common.networks import open_weights
from benchmarks.common.photos import draw_views
from benchmarks.common.results import Clock, Results, Row
from benchmarks.common.tables import print_checks

MAX_SECONDS, MAX_GIB, EPOCHS = 900.0, 4.0, 4


def measure_resnet50(options: argparse.Namespace) -> Row:
    """Time and peak memory of one conversion and calibration."""
    network = open_weights("resnet50_embed768", options.weights)
    images = draw_views(network, options.photos, options.images, 0, use_all=True)[0]
    student = copy.deepcopy(network)
    clock = Clock()
    lego.convert_(student, lego.plan(student, lego.LegoSpec(k=options.k)))
    converted = clock.read()["seconds"]
    record = lego.calibrate_(
        student, network, images, epochs=options.epochs, batch_size=options.batch_size
    )
    times = clock.read()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    facts = {"convert_seconds": converted, **times, "peak_gb": peak}
    return {**facts, "error_before": record.error_before, "error_after": record.error_after}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    add_run_arguments(parser, EPOCHS)
    parser.add_argument(
        "--weights", type=parse_file, required=True, help="weights of a ResNet-50 of 768 outputs"
    )
    add_photo_folder(parser)
    parser.add_argument("--images", type=int, default=256, help="views of the photos")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    return parser.parse_args()


def main() -> int:
    """Measure and compare with the targets; returns 1 where one is missed."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    key = {"table": "resnet50", "images": options.images, "k": options.k, "epochs": options.epochs}
    key |= {"threads": options.threads, "batch_size": options.batch_size}
    row = Results(options.out).measure(key, partial(measure_resnet50, options))
    targets = (("seconds", "s", MAX_SECONDS), ("peak_gb", "GiB", MAX_GIB))
    checks = [
        (f"{name}: {row[name]:.1f} of {limit:.0f} {unit}", row[name] <= limit)
        for name, unit, limit in targets
    ]
    return 0 if print_checks(checks) else 1


if __name__ == "__main__":
    sys.exit(main())
