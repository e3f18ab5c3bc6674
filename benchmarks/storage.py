"""What does it cost to store Lego filters in fewer bits?

    python benchmarks/storage.py                              # the shipped network and images
    python benchmarks/storage.py --weights-dir WEIGHTS --data photos

Converts a network at m=0.5 o=2, calibrates it with the shipped unlabelled images or half of the
photos, and stores it with filters as fp32, fp16, bf16 and int8 (a scale for each filter). Prints
the size of the folder, the compression, and what the rounding alone changes: top-1 on the shipped
held-out images, or, for networks with real weights, the agreement with the fp32 form and the
relative change of the outputs on the other photos.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

import legocompress as lego
from legocompress.data.images import Images
from legocompress.spec import FilterDtype

DTYPES: tuple[FilterDtype, ...] = ("fp32", "fp16", "bf16", "int8")
REAL = {
    "squeezenet1_1": ("torchvision/squeezenet1_1", {"mean": [0.4850, 0.4580, 0.4076],
                                                    "std": [1 / 255] * 3}),
    "mobilenet_v2": ("torchvision/mobilenet_v2", {}),
    "tf_efficientnet_lite0": ("timm/tf_efficientnet_lite0", {}),
}  # fmt: skip


def calibrated(architecture: str, given: dict[str, Any], k: int, images: Any) -> nn.Module:
    """The network in its Lego form, repaired with `images`."""
    dense = lego.create(architecture, **given)
    model = copy.deepcopy(dense)
    lego.convert_(model, lego.plan(model, lego.LegoSpec(m=0.5, o=2, k=k)))
    lego.calibrate_(model, dense, torch.cat([x for x, _ in images.batches(64)]))
    return model


def both(model: nn.Module, data: Path | None, demo: Any) -> tuple[Images, Images]:
    """Images to calibrate with, and others to judge by."""
    if data is None:
        unlabelled = lego.open_images(str(demo / "fashion-calibration.npz"), model, labels=False)
        return unlabelled, lego.open_images(str(demo / "fashion-sample.npz"), model)
    photos = lego.open_images(str(data), model, labels=False)
    parts = [Subset(photos.dataset, range(start, photos.size, 2)) for start in (0, 1)]
    first, second = (replace(photos, dataset=part, size=len(part)) for part in parts)
    return first, second


def stored(model: nn.Module, dtype: FilterDtype, place: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network with filters of this dtype, as it loads from its folder, and its totals."""
    for _, module in lego.lego_modules(model):
        module.storage_dtype = dtype
    folder = lego.save(model, place, force=True)
    loaded = lego.load(folder)
    return loaded, lego.measure(loaded, path=folder).totals()


def main() -> None:
    """Print a row per network, k and dtype."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--weights-dir", type=Path, help="Real weights, by file name.")
    parser.add_argument("--data", type=Path, help="A folder of photos.")
    parser.add_argument("--k", type=int, nargs="*", default=[1, 4])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    demo = files("legocompress") / "demo"
    jobs: list[tuple[str, str, dict[str, Any]]] = []
    if args.weights_dir is None:
        jobs.append(("shipped", f"local-dir:{demo / 'fashion-resnet'}", {}))
    else:
        for name, (architecture, preprocess) in REAL.items():
            weights = args.weights_dir / f"{name}.safetensors"
            jobs.append((name, architecture, {"weights": weights, "preprocess": preprocess}))
    print("| network | k | filters | stored | smaller | top-1 | agreement with fp32 | change |")
    print("|---|---|---|---|---|---|---|---|")
    for name, architecture, given in jobs:
        for k in args.k:
            unlabelled, images = both(lego.create(architecture, **given), args.data, demo)
            model = calibrated(architecture, given, k, unlabelled)
            wide: nn.Module | None = None
            for dtype in DTYPES:
                with tempfile.TemporaryDirectory() as place:
                    loaded, totals = stored(model, dtype, Path(place) / name)
                wide = wide or loaded
                with torch.no_grad():
                    found = lego.evaluate(loaded, images.batches(64), wide)
                top1 = "" if found.top1 is None else f"{found.top1:.2f} %"
                smaller = totals["dense_bits"] / 8 / totals["stored_bytes"]
                print(
                    f"| {name} | {k} | {dtype} | {totals['stored_bytes'] / 1e3:.0f} kB "
                    f"| {smaller:.2f}x | {top1} | {found.agreement:.2f} % "
                    f"| {found.output_error:.1e} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
