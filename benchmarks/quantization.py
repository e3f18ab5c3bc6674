"""What int8 costs: accuracy against fp32, and the size of the file.

    python -m benchmarks.quantization --fashion fashion-mnist
    python -m benchmarks.quantization --weights-dir weights --data photos

Claim: a network in int8 loses at most 0.3 points on Fashion-MNIST, and a Lego ResNet chooses the
same class as in fp32 for at least 99 % of the images. The first form takes the shipped network,
dense and converted at m=0.5 o=2, calibrated and quantised with shipped unlabelled images, and
prints top-1 on the 10,000 test images. The second takes pretrained networks, dense, half of the
photos for the ranges and the others to judge. Both run the int8 kernels, which compute what the
emulation does. Exit status 1 where a target is missed. Takes about five minutes on one core.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import legocompress as lego
from benchmarks.common.arguments import make_parser, parse_fashion_folder, parse_folder
from benchmarks.common.fashion_mnist import prepare_inputs, read_split
from benchmarks.common.networks import add_weights_folder
from benchmarks.common.tables import format_head, format_row, print_checks
from benchmarks.common.tasks import SHIPPED
from benchmarks.storage import calibrate_converted, list_networks, open_image_sets

MAX_LOST = 0.3  # points
MIN_AGREEMENT = 99.0  # percent
N_RANGES = 128  # images that ranges are measured on
BATCH = 50


def predict(model: nn.Module, inputs: Tensor) -> Tensor:
    """The logits of all inputs."""
    with torch.no_grad():
        return torch.cat([model(batch) for batch in torch.split(inputs, BATCH)])


def measure(model: nn.Module, ranges: Tensor, inputs: Tensor, labels: Tensor | None) -> list[str]:
    """Quantise a network, and compare it with itself in fp32; the cells of a line."""
    expected = predict(model, inputs)
    lego.quantize_(model, ranges)
    record = lego.lego_state(model).quantization
    assert record is not None
    actual = predict(lego.deploy_(model, inputs[:BATCH]), inputs)
    deployment = lego.lego_state(model).deployment
    assert deployment is not None
    assert not [note for note in deployment.notes if "emulation" in note], deployment.notes
    agreement = 100 * float((expected.argmax(1) == actual.argmax(1)).double().mean())
    centred = expected - expected.mean(1, keepdim=True)
    change = float((actual - actual.mean(1, keepdim=True) - centred).norm() / centred.norm())
    tops = [""] * 3
    if labels is not None:
        top = [100 * float((y.argmax(1) == labels).double().mean()) for y in (expected, actual)]
        tops = [f"{top[0]:.2f}", f"{top[1]:.2f}", f"{top[0] - top[1]:.2f}"]
    with tempfile.TemporaryDirectory() as place:
        folder = lego.save(model, Path(place) / "saved")
        size = sum(path.stat().st_size for path in folder.iterdir())
    kept = str(len(record.float_layers))
    return [*tops, f"{agreement:.2f}", f"{change:.3f}", record.method, kept, f"{size / 1e6:.2f}"]


def list_cases(
    args: argparse.Namespace,
) -> Iterator[tuple[str, nn.Module, Tensor, Tensor, Tensor | None]]:
    """Name, network, images for the ranges, images to judge by, and their labels."""
    if args.fashion is not None:
        dense = lego.create(f"local-dir:{SHIPPED}").eval()
        pixels, numbers = read_split(args.fashion, "t10k")
        inputs, labels = prepare_inputs(dense, pixels), torch.from_numpy(numbers).long()
        unlabelled, _ = open_image_sets(dense, None)
        ranges = torch.cat([x for x, _ in unlabelled.batches(64)])[:N_RANGES]
        yield "shipped, dense", copy.deepcopy(dense), ranges, inputs, labels
        for k in args.k:
            model = calibrate_converted(dense, k, unlabelled)
            yield f"shipped, k={k}", model, ranges, inputs, labels
    if args.weights_dir is not None:
        for name, dense in list_networks(args.weights_dir):
            ours, others = open_image_sets(dense, args.data)
            sets = [torch.cat([x for x, _ in images.batches(64)]) for images in (ours, others)]
            yield f"{name}, dense", dense.eval(), sets[0][:N_RANGES], sets[1], None


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--fashion", type=parse_fashion_folder, help="folder of Fashion-MNIST")
    add_weights_folder(parser, required=False, text="folder of NETWORK.safetensors")
    parser.add_argument("--data", type=parse_folder, help="folder of photos, for --weights-dir")
    parser.add_argument("--k", type=int, nargs="*", default=[1, 4])
    args = parser.parse_args()
    if args.fashion is None and args.weights_dir is None:
        parser.error("give --fashion, or --weights-dir and --data")
    if args.weights_dir is not None and args.data is None:
        parser.error("--weights-dir needs --data, a folder of photos")
    return args


def main() -> int:
    """Print one line per network; returns 1 where a target is missed."""
    args = parse_arguments()
    warnings.simplefilter("ignore")
    columns = ["network", "fp32", "int8", "points lost", "agreement %", "change", "ranges"]
    print(format_head([*columns, "layers in fp32", "MB"]))
    checks = []
    for name, model, ranges, inputs, labels in list_cases(args):
        cells = measure(model, ranges, inputs, labels)
        print(format_row([name, *cells]), flush=True)
        if labels is not None:
            checks.append((f"{name}: at most {MAX_LOST} points", float(cells[2]) <= MAX_LOST))
            is_lego = any(True for _ in lego.lego_modules(model))
            if is_lego:
                same = float(cells[3]) >= MIN_AGREEMENT
                checks.append((f"{name}: at least {MIN_AGREEMENT} % agreement", same))
    return 0 if print_checks(checks) else 1


if __name__ == "__main__":
    sys.exit(main())
