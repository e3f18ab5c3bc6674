"""What calibration brings back of pretrained networks, with a few unlabelled photos.

    python -m benchmarks.calibration_networks --weights-dir weights --photos photos

Claim: calibration brings the outputs nearer to the original's on photos that it did not see, and
sizing by layer helps. Prints, per network and k, the agreement in top-1 and the relative error of
the outputs before and after, and the error of each layer. Takes minutes (SqueezeNet, 96 views, 16
epochs) to hours (all networks with the default settings) on one core. Rows are appended to --out
and not measured again.
"""

from __future__ import annotations

import argparse
import copy
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import legocompress as lego
from benchmarks.common.arguments import add_photo_folder, add_run_arguments, make_parser
from benchmarks.common.networks import NETWORKS, add_weights_folder, open_network
from benchmarks.common.photos import draw_views
from benchmarks.common.results import Results, Row
from benchmarks.common.sizing import SIZINGS, add_terms_argument, make_sizing_key, size_layers
from legocompress.calibrate.calibration import EPOCHS
from legocompress.calibrate.joint import agreement, output_error
from legocompress.models.probe import evaluating

BATCH = 32


def has_imagenet_classes(network: nn.Module) -> bool:
    """Whether the outputs are the thousand classes of ImageNet."""
    image = torch.zeros(1, 3, 224, 224)
    with evaluating(network):
        return bool(network(image).shape[1] == 1000)


def compare_calibrated(
    network: nn.Module,
    spec: lego.LegoSpec,
    views: tuple[Tensor, Tensor],
    epochs: int,
    seed: int,
) -> dict[str, Any]:
    """Convert and calibrate a copy; agreement and error on unseen views before and after.

    Args:
        network: the original.
        spec: how it is converted.
        views: to calibrate with, and unseen ones.
        epochs: of tuning all layers together.
        seed: of clustering and calibration.

    Returns:
        The numbers of a row; agreement in the first class is None where outputs are not classes.
    """
    calibration_views, unseen = views
    student = copy.deepcopy(network)
    lego.convert_(student, lego.plan(student, spec), seed)
    classes = has_imagenet_classes(network)
    batches = torch.split(unseen, BATCH)

    def judge(when: str) -> dict[str, float | None]:
        with evaluating(student), evaluating(network):
            agree = partial(agreement, student, network, batches)
            return {
                f"error_{when}": output_error(student, network, batches),
                f"agreement_{when}": agree() if classes else None,
            }

    before = judge("before")
    record = lego.calibrate_(student, network, calibration_views, seed=seed, epochs=epochs)
    layers = [row.model_dump() for row in record.layers]
    sizes = {"n_seen": len(calibration_views), "n_unseen": len(unseen)}
    return {**sizes, **before, **judge("after"), "norms": record.norms, "layers": layers}


def measure_network(options: argparse.Namespace, name: str, k: int) -> Row:
    """Open a network, size its layers and calibrate it with views of the photos."""
    network = open_network(name, options.weights_dir)
    views = draw_views(network, options.photos, options.views, options.seed)
    spec = lego.LegoSpec(m=options.m, o=options.o, k=k)
    spec = size_layers(network, spec, options.sized, options.terms)
    return compare_calibrated(network, spec, views, options.epochs, options.seed)


def format_layer(row: Row | None) -> str:
    """The error of one layer before and after, or why there is none."""
    if row is None or row["before"] is None:
        return "-" if row is None else (row["note"] or "-")[:16]
    return f"{row['before']:.3f} -> {row['after']:.3f}"


def print_networks(rows: list[Row]) -> None:
    """One line per network and k."""
    print("\nOn views of photos that calibration did not see: before -> after")
    print(f"{'network':22s} {'k':>2s} {'views':>11s} {'top-1 agrees %':>16s} {'output error':>16s}")
    for row in rows:
        pairs = [("agreement_before", "agreement_after"), ("error_before", "error_after")]
        cells = ["-" if row[a] is None else f"{row[a]:.3g} -> {row[b]:.3g}" for a, b in pairs]
        count = f"{row['n_seen']} / {row['n_unseen']}"
        print(f"{row['network']:22s} {row['k']:2d} {count:>11s} {cells[0]:>16s} {cells[1]:>16s}")


def print_layers(name: str, rows: list[Row]) -> None:
    """One line per layer of a network, with one column per k."""
    print(f"\n{name}: relative error of each layer's output on held-out photos")
    print(f"{'layer':40s} " + " ".join(f"{'k=' + str(r['k']):>16s}" for r in rows))
    tables = [{layer["name"]: layer for layer in row["layers"]} for row in rows]
    for layer in dict.fromkeys(name for table in tables for name in table):
        cells = [format_layer(table.get(layer)) for table in tables]
        print(f"{layer[-40:]:40s} " + " ".join(f"{text:>16s}" for text in cells))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    add_run_arguments(parser, EPOCHS)
    add_terms_argument(parser)
    add_weights_folder(parser, required=True, text="folder of NETWORK.safetensors")
    add_photo_folder(parser)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--k", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--m", type=float, default=0.5)
    parser.add_argument("--o", type=int, default=2)
    parser.add_argument("--sized", choices=SIZINGS, default="uniform")
    parser.add_argument(
        "--views", type=int, default=256, help="for calibration; half as many unseen"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    """Measure what is missing and print the tables."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    results = Results(options.out)
    settings = {name: getattr(options, name) for name in ("views", "epochs", "m", "o")}
    settings |= {"table": "networks", "seed": options.seed}
    settings |= make_sizing_key(options.sized, options.terms)
    for name in options.network:
        for k in options.k:
            key = {**settings, "network": name, "k": k}
            results.measure(key, partial(measure_network, options, name, k))
    rows = results.select(**settings)
    print_networks(rows)
    for name in dict.fromkeys(row["network"] for row in rows):
        print_layers(name, [row for row in rows if row["network"] == name])
    return 0


if __name__ == "__main__":
    sys.exit(main())
