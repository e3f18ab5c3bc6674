"""How the demo network that ships with the package was trained.

    python -m benchmarks.train_demo --data-dir fashion-mnist --out legocompress/demo/fashion-resnet

Claim: the shipped network is a small timm ResNet that anybody can train again: Fashion-MNIST, 18
epochs, seed 0, one thread. Prints the accuracy before and after rounding to fp16. Takes about an
hour on one core. `--epochs 0 --sample N --calibration N` writes the shipped images only.

The folder written is a timm hub folder: `timm.create_model("local-dir:FOLDER", pretrained=True)`
rebuilds the network without this script and without legocompress.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch
from safetensors.torch import save
from torch import Tensor, nn

from benchmarks.common.arguments import add_fashion_folder, make_parser
from benchmarks.common.fashion_mnist import (
    CLASSES,
    MEAN,
    N_VALIDATION,
    SIZE,
    STD,
    measure_accuracy,
    normalize,
    prepare_inputs,
    read_split,
    scale_up,
    split_validation,
    train_,
)

Images = tuple[Tensor, Tensor]  # inputs (N, 1, SIZE, SIZE) and class numbers (N,)

ARCHITECTURE = "resnet18"
MODEL_ARGS: dict[str, Any] = {
    "in_chans": 1,
    "num_classes": len(CLASSES),
    "channels": [16, 32, 64, 128],
    "layers": [2, 2, 2, 1],
}


def build_config(n_features: int) -> dict[str, Any]:
    """What timm needs to rebuild the network and its preprocessing."""
    return {
        "architecture": ARCHITECTURE,
        "num_classes": len(CLASSES),
        "num_features": n_features,
        "label_names": list(CLASSES),
        "pretrained_cfg": {
            "num_classes": len(CLASSES),
            "input_size": [1, SIZE, SIZE],
            "fixed_input_size": False,
            "pool_size": None,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": [MEAN],
            "std": [STD],
            "first_conv": "conv1",
            "classifier": "fc",
            "license": "apache-2.0",
        },
        "model_args": MODEL_ARGS,
    }


def write_hub_folder(model: nn.Module, folder: Path) -> None:
    """Write `config.json` and `model.safetensors`, every float tensor rounded to fp16."""
    tensors = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in model.state_dict().items()
    }
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"{name}: a value does not fit fp16")
    config = json.dumps(build_config(tensors["fc.weight"].shape[1]), indent=2) + "\n"
    (folder / "config.json").write_text(config, encoding="utf-8")
    # Not save_file, which leaves a file that only its owner may read.
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))


def load_hub_folder(folder: Path) -> nn.Module:
    """The network as timm alone rebuilds it, in fp32 from the rounded weights."""
    model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return model


def save_npz(path: Path, **arrays: npt.NDArray[Any]) -> None:
    """Write a compressed npz under a temporary name, then rename it."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    os.replace(temporary, path)
    print(f"wrote {path}")


def write_sample(data_dir: Path, path: Path, n_images: int, seed: int) -> None:
    """Write labelled test images, equally many per class, in the order of the test split."""
    images, labels = read_split(data_dir, "t10k")
    rng = np.random.default_rng(seed)
    n_each = n_images // len(CLASSES)
    chosen = np.sort(
        np.concatenate(
            [
                rng.choice(np.flatnonzero(labels == c), n_each, replace=False)
                for c in range(len(CLASSES))
            ]
        )
    )
    save_npz(
        path,
        images=images[chosen],
        labels=labels[chosen].astype(np.int64),
        classes=np.array(CLASSES),
    )


def write_calibration(data_dir: Path, path: Path, n_images: int, seed: int) -> None:
    """Write unlabelled images of those that the network is trained on."""
    images = read_split(data_dir, "train")[0][:-N_VALIDATION]
    chosen = np.random.default_rng(seed).choice(len(images), n_images, replace=False)
    save_npz(path, images=images[np.sort(chosen)])


def print_accuracies(name: str, trained: nn.Module, stored: nn.Module, images: Images) -> None:
    """Print the accuracy on a split before and after rounding to fp16."""
    inputs, labels = images
    print(
        f"{name}: trained {measure_accuracy(trained, inputs, labels):.2f} %,"
        f" stored in fp16 {measure_accuracy(stored, inputs, labels):.2f} %"
    )


def build_network(data_dir: Path, out: Path, n_epochs: int, seed: int) -> None:
    """Train the network, write it to `out` and print the accuracy of the stored network."""
    images, label_bytes = read_split(data_dir, "train")
    train, validation = split_validation(scale_up(images), label_bytes)

    torch.manual_seed(seed)
    model = timm.create_model(ARCHITECTURE, **MODEL_ARGS).to(memory_format=torch.channels_last)
    print(f"{ARCHITECTURE}, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    train_(model, train, validation, n_epochs, seed)

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        folder = Path(temporary)
        write_hub_folder(model, folder)
        stored = load_hub_folder(folder)
        # Training scales by PIL once and normalizes whole batches, timm's transform takes one PIL
        # image: the inputs agree to float rounding, far below 1/255, and so does the accuracy.
        inputs = prepare_inputs(stored, images[-N_VALIDATION:])
        torch.testing.assert_close(normalize(validation[0]), inputs, rtol=0, atol=1e-5)
        print_accuracies("validation", model, stored, (inputs, validation[1]))
        test_images, test_bytes = read_split(data_dir, "t10k")
        test_labels = torch.from_numpy(test_bytes.astype(np.int64))
        test_inputs = prepare_inputs(stored, test_images)
        print_accuracies("test", model, stored, (test_inputs, test_labels))
        out.mkdir(exist_ok=True)
        for name in ("model.safetensors", "config.json"):
            os.replace(folder / name, out / name)
    print(f"wrote {out}")


def parse_args() -> argparse.Namespace:
    """Read the command line; nothing is overwritten without `--force`."""
    parser = make_parser(__doc__)
    add_fashion_folder(parser)
    parser.add_argument("--out", type=Path, required=True, help="timm hub folder to write")
    parser.add_argument("--epochs", type=int, default=18, help="0 trains and writes no network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="other numbers round differently")
    parser.add_argument(
        "--sample", type=int, metavar="N", help="also write N test images beside --out, with labels"
    )
    parser.add_argument(
        "--calibration", type=int, metavar="N", help="also write N training images, no labels"
    )
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    args = parser.parse_args()
    beside = args.out.parent
    args.sample_path = beside / "fashion-sample.npz" if args.sample else None
    args.calibration_path = beside / "fashion-calibration.npz" if args.calibration else None
    targets = (args.out if args.epochs else None, args.sample_path, args.calibration_path)
    for target in targets:
        if target is not None and target.exists() and not args.force:
            parser.error(f"{target} exists; --force overwrites it")
    if args.epochs < 0:
        parser.error("--epochs must not be negative")
    if args.sample and args.sample % len(CLASSES):
        parser.error(f"--sample must be a multiple of {len(CLASSES)}, equally many per class")
    return args


def main() -> None:
    """Write whatever the command line asks for."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.sample_path:
        write_sample(args.data_dir, args.sample_path, args.sample, args.seed)
    if args.calibration_path:
        write_calibration(args.data_dir, args.calibration_path, args.calibration, args.seed)
    if args.epochs:
        build_network(args.data_dir, args.out, args.epochs, args.seed)


if __name__ == "__main__":
    main()
