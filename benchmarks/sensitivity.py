"""Whether measured sensitivity spends a budget better than the errors of the weights.

    python -m benchmarks.sensitivity --weights-dir weights --photos photos --labelled val \
        --class-map classes.txt

Claim: one backward pass per photo estimates what each layer costs the outputs to within a factor of
two. Whether a budget should be spent by it, or by the errors of the weights, is compared. Prints
which layers do the damage, each alone, as estimated and as measured, and per network the sum of the
layers' losses, KL and agreement of the whole network on unseen photos, and top-1 on labelled ones.
The budget is the MACs of m=0.5 o=2 and k. Takes an hour per network on one core. Rows are appended
to --out and not measured again.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import legocompress as lego
from benchmarks.common.arguments import add_run_arguments, make_parser, parse_file, parse_folder
from benchmarks.common.networks import ARCHITECTURES, add_weights_folder, open_network
from benchmarks.common.results import Results, Row
from benchmarks.common.tables import format_head, format_row
from legocompress.models.output_errors import compare_outputs
from legocompress.models.probe import evaluating

BATCH = 32
SIZINGS = ("uniform", "weights", "sensitivity")


def draw_photos(
    network: nn.Module, folder: Path, n_seen: int, n_unseen: int
) -> tuple[Tensor, Tensor]:
    """Photos to calibrate with and to measure sensitivity, and others that no step sees."""
    images = lego.open_images(str(folder), network, labels=False).sample(n_seen + n_unseen)
    both = lego.gather((batch for batch, _ in images.batches(BATCH)), images.size)
    return both[:n_seen], both[n_seen:]


def measure_sensitivity(options: argparse.Namespace, name: str, journal: Path) -> Row:
    """The sensitivity of a network's layers."""
    network = open_network(name, options.weights_dir)
    seen, _ = draw_photos(network, options.photos, options.images, options.unseen)
    spec = lego.LegoSpec(k=options.k)
    found = lego.sensitivity(network, seen[: options.measured], spec, journal=journal)
    return {"layers": found.model_dump(mode="json")}


def size_layers(
    network: nn.Module, options: argparse.Namespace, sizing: str, found: lego.Sensitivity
) -> lego.LegoSpec:
    """One m, o and k for all layers, or settings per layer within the MACs of these."""
    uniform = lego.LegoSpec(m=options.m, o=options.o, k=options.k)
    if sizing == "uniform":
        return uniform
    converted = lego.convert_(copy.deepcopy(network), lego.plan(network, uniform))
    costs = lego.measure(converted).totals()
    share = costs["macs_used_only"] / costs["dense_macs"]
    by = found if sizing == "sensitivity" else None
    return lego.allocate(network, lego.LegoSpec(k=options.k), max_macs=share, sensitivity=by)


def measure_sizing(
    options: argparse.Namespace, name: str, sizing: str, found: lego.Sensitivity
) -> Row:
    """Size, convert and calibrate a network, and judge it on photos that no step saw."""
    network = open_network(name, options.weights_dir)
    seen, unseen = draw_photos(network, options.photos, options.images, options.unseen)
    spec = size_layers(network, options, sizing, found)
    student = copy.deepcopy(network)
    lego.convert_(student, lego.plan(student, spec))
    errors = {n: float(layer.weight_error or 0) for n, layer in lego.lego_modules(student)}
    costs = lego.measure(student).totals()
    row: Row = {
        "share_of_macs": costs["macs_used_only"] / costs["dense_macs"],
        "share_of_bits": costs["bits"] / costs["dense_bits"],
        "weight_error": costs["relative_weight_error"],
        "expected": found.add_up(errors),
        "converted": judge(student, network, unseen),
    }
    record = lego.calibrate_(student, network, seen, epochs=options.epochs)
    row |= {"calibrated": judge(student, network, unseen), "norms": record.norms}
    labelled = lego.open_images(
        str(options.labelled), network, class_map=str(options.class_map)
    ).sample(options.judged)
    evaluation = lego.evaluate(student, labelled.batches(BATCH), network, labelled.n_classes)
    rules = [rule.model_dump(exclude_none=True) for rule in spec.rules]
    return {**row, "labelled": dataclasses.asdict(evaluation), "rules": rules}


def judge(student: nn.Module, network: nn.Module, images: Tensor) -> dict[str, Any]:
    """Errors of a network on images."""
    with evaluating(student), evaluating(network):
        return dataclasses.asdict(compare_outputs(student, network, torch.split(images, BATCH)))


def print_layers(name: str, found: lego.Sensitivity) -> None:
    """One row per layer: its errors and what it costs alone, the worst first."""
    print(f"\n{name}: one layer at a time, fitted to its inputs; {found.images} photos\n")
    columns = ["layer", "m, o, k", "weight error", "output error"]
    print(format_head([*columns, "KL estimated", "KL run", "agrees %"]))
    for layer in sorted(found.layers, key=lambda layer: -(layer.measured_loss or 0)):
        if layer.forms:
            form = layer.forms[0]
            cells = [layer.name, f"{form.m:.2g}, {form.o}, {form.k}", f"{form.weight_error:.3f}"]
            cells.append("-" if form.output_error is None else f"{form.output_error:.3f}")
            cells += [f"{form.loss:.4f}", f"{layer.measured_loss:.4f}", f"{layer.agreement:.1f}"]
            print(format_row(cells))


def print_sizings(rows: list[Row]) -> None:
    """One row per network and sizing."""
    print("\nEqual MACs, the same calibration; unseen photos, then labelled ones\n")
    columns = ["network", "sizing", "MACs", "size", "sum of KL", "KL converted", "KL calibrated"]
    columns += ["logit error", "agrees %", "labelled: agrees %", "top-1", "original"]
    print(format_head(columns))
    for row in rows:
        after, labelled = row["calibrated"], row["labelled"]
        cells = [row["network"], row["sized"], f"{row['share_of_macs']:.3f}"]
        cells += [f"{row['share_of_bits']:.3f}", f"{row['expected']:.3f}"]
        cells += [f"{row['converted']['divergence']:.2f}", f"{after['divergence']:.3f}"]
        cells += [f"{after['logits']:.3f}", f"{after['agreement']:.1f}"]
        cells += [f"{labelled['agreement']:.1f}", f"{labelled['top1']:.1f}"]
        print(format_row([*cells, f"{labelled['original_top1']:.1f}"]))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    add_run_arguments(parser, 4, "sensitivity.jsonl")
    add_weights_folder(parser, required=True, text="folder of NETWORK.safetensors")
    parser.add_argument("--photos", type=parse_folder, required=True, help="photos, no labels read")
    parser.add_argument("--labelled", type=parse_folder, required=True, help="folders of classes")
    parser.add_argument("--class-map", type=parse_file, required=True, help="of --labelled")
    parser.add_argument(
        "--network", nargs="+", choices=ARCHITECTURES, default=["squeezenet1_1", "mobilenet_v2"]
    )
    parser.add_argument("--sized", nargs="*", choices=SIZINGS, default=SIZINGS)
    parser.add_argument("--m", type=float, default=0.5)
    parser.add_argument("--o", type=int, default=2)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--images", type=int, default=384, help="photos to calibrate with")
    parser.add_argument("--measured", type=int, default=288, help="of them, for the sensitivity")
    parser.add_argument("--unseen", type=int, default=256, help="photos to judge by")
    parser.add_argument("--judged", type=int, default=1000, help="labelled photos to judge by")
    return parser.parse_args()


def main() -> int:
    """Measure what is missing and print the tables."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    results = Results(options.out)
    names = ("k", "images", "measured", "unseen")
    common = {name: getattr(options, name) for name in names}
    more = {name: getattr(options, name) for name in ("m", "o", "epochs", "judged")}
    for name in options.network:
        key = {"table": "layers", "network": name, **common}
        journal = options.out.with_name(f"{options.out.name}.{name}")
        row = results.measure(key, partial(measure_sensitivity, options, name, journal))
        found = lego.Sensitivity.model_validate_json(json.dumps(row["layers"]))
        print_layers(name, found)
        for sizing in options.sized:
            key = {"table": "sizings", "network": name, "sized": sizing, **common, **more}
            results.measure(key, partial(measure_sizing, options, name, sizing, found))
    print_sizings(results.select(table="sizings", **common, **more))
    return 0


if __name__ == "__main__":
    sys.exit(main())
