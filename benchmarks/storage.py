"""What it costs to store Lego filters in fewer bits.

    python -m benchmarks.storage                              # the shipped network and images
    python -m benchmarks.storage --weights-dir weights --data photos

Claim: filters as fp16, bf16 or int8 (one scale per filter) make the file up to three times smaller
and change next to nothing. Converts a network at m=0.5 o=2, calibrates it with the shipped
unlabelled images or half of the photos, and stores it in each dtype. Prints the size of the folder,
the compression, and what the rounding alone changes: top-1 on the shipped held-out images, or the
agreement with the fp32 form and the relative change of the outputs on the other photos. Takes about
two minutes for the shipped network on one core.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

import legocompress as lego
from benchmarks.common.arguments import make_parser, parse_folder
from benchmarks.common.networks import ARCHITECTURES, add_weights_folder
from benchmarks.common.tables import format_head, format_row
from benchmarks.common.tasks import SHIPPED
from legocompress.data.images import Images
from legocompress.spec import FilterDtype

DTYPES: tuple[FilterDtype, ...] = ("fp32", "fp16", "bf16", "int8")
# SqueezeNet's preprocessing is rounded here, as it was when the numbers were taken.
SQUEEZENET = {"mean": [0.4850, 0.4580, 0.4076], "std": [1 / 255] * 3}
PREPROCESS: dict[str, dict[str, Any]] = {
    "squeezenet1_1": SQUEEZENET,
    "mobilenet_v2": {},
    "tf_efficientnet_lite0": {},
}


def list_networks(weights: Path | None) -> Iterator[tuple[str, nn.Module]]:
    """The shipped network, or those of the weights folder, by name."""
    if weights is None:
        yield "shipped", lego.create(f"local-dir:{SHIPPED}")
        return
    for name, preprocess in PREPROCESS.items():
        path = weights / f"{name}.safetensors"
        yield name, lego.create(ARCHITECTURES[name].name, weights=path, preprocess=preprocess)


def calibrate_converted(dense: nn.Module, k: int, images: Images) -> nn.Module:
    """The Lego form of a network, calibrated with images."""
    model = copy.deepcopy(dense)
    lego.convert_(model, lego.plan(model, lego.LegoSpec(m=0.5, o=2, k=k)))
    lego.calibrate_(model, dense, torch.cat([x for x, _ in images.batches(64)]))
    return model


def open_image_sets(model: nn.Module, data: Path | None) -> tuple[Images, Images]:
    """Images to calibrate with, and others to judge by."""
    if data is None:
        demo = SHIPPED.parent
        unlabelled = lego.open_images(str(demo / "fashion-calibration.npz"), model, labels=False)
        return unlabelled, lego.open_images(str(demo / "fashion-sample.npz"), model)
    photos = lego.open_images(str(data), model, labels=False)
    parts = [Subset(photos.dataset, range(start, photos.size, 2)) for start in (0, 1)]
    first, second = (replace(photos, dataset=part, size=len(part)) for part in parts)
    return first, second


def store(model: nn.Module, dtype: FilterDtype, place: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Save a network with filters of this dtype; the network as it loads again, and its totals."""
    for _, module in lego.lego_modules(model):
        module.storage_dtype = dtype
    folder = lego.save(model, place, force=True)
    loaded = lego.load(folder)
    return loaded, lego.measure(loaded, path=folder).totals()


def print_dtypes(name: str, k: int, model: nn.Module, images: Images) -> None:
    """Print one line per dtype."""
    wide: nn.Module | None = None
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as place:
            loaded, totals = store(model, dtype, Path(place) / name)
        wide = wide or loaded
        with torch.no_grad():
            result = lego.evaluate(loaded, images.batches(64), wide)
        cells = [
            name,
            k,
            dtype,
            f"{totals['stored_bytes'] / 1e3:.0f} kB",
            f"{totals['dense_bits'] / 8 / totals['stored_bytes']:.2f}x",
            "" if result.top1 is None else f"{result.top1:.2f} %",
            f"{result.agreement:.2f} %",
            f"{result.output_error:.1e}",
        ]
        print(format_row(cells), flush=True)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    text = "folder of NETWORK.safetensors; without it the shipped network is taken"
    add_weights_folder(parser, required=False, text=text)
    parser.add_argument("--data", type=parse_folder, help="folder of photos, for --weights-dir")
    parser.add_argument("--k", type=int, nargs="*", default=[1, 4])
    args = parser.parse_args()
    if args.weights_dir is not None and args.data is None:
        parser.error("--weights-dir needs --data, a folder of photos")
    return args


def main() -> None:
    """Print one line per network, k and dtype."""
    args = parse_arguments()
    warnings.simplefilter("ignore")
    columns = ["network", "k", "filters", "stored", "smaller", "top-1", "agreement with fp32"]
    print(format_head([*columns, "change"]))
    for name, dense in list_networks(args.weights_dir):
        for k in args.k:
            unlabelled, images = open_image_sets(dense, args.data)
            print_dtypes(name, k, calibrate_converted(dense, k, unlabelled), images)


if __name__ == "__main__":
    main()
