"""What does it cost to store Lego filters in fewer bits?

    python benchmarks/storage.py                              # the shipped network and images
    python benchmarks/storage.py --weights-dir WEIGHTS --data photos

Converts a network at m=0.5 o=2 with filters stored as fp32, fp16, bf16 and int8 (a scale for each
filter) and prints the size of the folder, the compression, and what the rounding changes: top-1 on
the shipped held-out images, or, for networks with real weights, the agreement with the fp32 form
and the relative change of the outputs. Everything else of the conversion is the same.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import legocompress as lego
from legocompress.spec import FilterDtype

DTYPES: tuple[FilterDtype, ...] = ("fp32", "fp16", "bf16", "int8")
REAL = {
    "squeezenet1_1": ("torchvision/squeezenet1_1", {"mean": [0.4850, 0.4580, 0.4076],
                                                    "std": [1 / 255] * 3}),
    "mobilenet_v2": ("torchvision/mobilenet_v2", {}),
    "tf_efficientnet_lite0": ("timm/tf_efficientnet_lite0", {}),
}  # fmt: skip


def compressed(
    model: nn.Module, k: int, dtype: FilterDtype, place: Path
) -> tuple[nn.Module, dict[str, Any]]:
    """The network with filters of this dtype, as it loads from its folder, and its totals."""
    spec = lego.LegoSpec(m=0.5, o=2, k=k, dtype=dtype)
    lego.convert_(model, lego.plan(model, spec))
    folder = lego.save(model, place / f"{dtype}-{k}")
    loaded = lego.load(folder)
    return loaded, lego.measure(loaded, path=folder).totals()


def main() -> None:
    """Print a row per network, k and dtype."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--weights-dir", type=Path, help="Real weights, by file name.")
    parser.add_argument("--data", type=Path, help="A folder of photos.")
    parser.add_argument("--k", type=int, nargs="*", default=[1, 4, 8])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    demo = files("legocompress") / "demo"
    jobs: list[tuple[str, str, dict[str, Any], str]] = []
    if args.weights_dir is None:
        jobs.append(("shipped", f"local-dir:{demo / 'fashion-resnet'}", {},
                     str(demo / "fashion-sample.npz")))  # fmt: skip
    else:
        for name, (architecture, preprocess) in REAL.items():
            given = {"weights": args.weights_dir / f"{name}.safetensors", "preprocess": preprocess}
            jobs.append((name, architecture, given, str(args.data)))
    print("| network | k | filters | stored | smaller | top-1 | agreement with fp32 | change |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        for name, architecture, given, data in jobs:
            for k in args.k:
                wide: nn.Module | None = None
                for dtype in DTYPES:
                    model = lego.create(architecture, **given)
                    loaded, totals = compressed(model, k, dtype, Path(place) / name)
                    wide = wide or loaded
                    images = lego.open_images(data, loaded, labels=args.weights_dir is None)
                    with torch.no_grad():
                        found = lego.evaluate(loaded, DataLoader(images.dataset, 64), wide)
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
