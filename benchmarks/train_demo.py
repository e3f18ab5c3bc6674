"""Train the demo network that ships with the package: a small timm ResNet on Fashion-MNIST.

    python benchmarks/train_demo.py --data-dir fashion-mnist --out legocompress/demo/fashion-resnet

The folder written is a timm hub folder: `timm.create_model("local-dir:FOLDER", pretrained=True)`
rebuilds the network without this script and without legocompress.
"""

import argparse
import gzip
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch
from PIL import Image
from safetensors.torch import save
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

Bytes = npt.NDArray[np.uint8]

SIZE = 56  # images are scaled up from 28: the stem and its pooling divide the side by four
MEAN, STD = 0.286, 0.353
MAX_SHIFT = 4  # pixels of the scaled image, so two of the original
N_VALIDATION = 5_000
BATCH_SIZE = 128
MAX_LR = 0.1
WEIGHT_DECAY = 5e-4
LABEL_SMOOTHING = 0.05
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
ARCHITECTURE = "resnet18"
MODEL_ARGS: dict[str, Any] = {
    "in_chans": 1,
    "num_classes": len(CLASSES),
    "channels": [16, 32, 64, 128],
    "layers": [2, 2, 2, 1],
}


def read_idx(path: Path, n_dims: int) -> Bytes:
    """Read one gzipped idx file of unsigned bytes with `n_dims` dimensions.

    Raises ValueError where the header or the length is not what the format says.
    """
    with gzip.open(path, "rb") as file:
        raw = file.read()
    n_header_bytes = 4 + 4 * n_dims
    if len(raw) < n_header_bytes or raw[:4] != bytes((0, 0, 8, n_dims)):
        raise ValueError(f"{path}: not an idx file of unsigned bytes with {n_dims} dimensions")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", count=n_dims, offset=4))
    values = np.frombuffer(raw, np.uint8, offset=n_header_bytes)
    if values.size != np.prod(shape):
        raise ValueError(f"{path}: the header says {shape}, but {values.size} bytes follow it")
    return values.reshape(shape)


def read_split(data_dir: Path, prefix: str) -> tuple[Bytes, Bytes]:
    """Images (N, 28, 28) and labels (N,) of the split `train` or `t10k`."""
    images = read_idx(data_dir / f"{prefix}-images-idx3-ubyte.gz", 3)
    labels = read_idx(data_dir / f"{prefix}-labels-idx1-ubyte.gz", 1)
    if images.shape[1:] != (28, 28) or len(images) != len(labels):
        raise ValueError(f"{data_dir}: {prefix} has images {images.shape}, labels {labels.shape}")
    if labels.max() >= len(CLASSES):
        raise ValueError(f"{data_dir}: {prefix} has label {labels.max()}, allowed 0 to 9")
    return images, labels


def scale_up(images: Bytes) -> Tensor:
    """Resize (N, 28, 28) bytes to (N, SIZE, SIZE) bytes, by PIL as timm's transform does."""
    size, bilinear = (SIZE, SIZE), Image.Resampling.BILINEAR
    scaled = np.stack([np.asarray(Image.fromarray(i).resize(size, bilinear)) for i in images])
    return torch.from_numpy(scaled)


def normalize(pixels: Tensor) -> Tensor:
    """Turn (N, SIZE, SIZE) bytes into the network's (N, 1, SIZE, SIZE) float input."""
    return pixels.unsqueeze(1).float().div_(255).sub_(MEAN).div_(STD)


def timm_inputs(model: nn.Module, images: Bytes) -> Tensor:
    """Make (N, 1, SIZE, SIZE) inputs as any user of the folder does, by its config alone."""
    transform = create_transform(**resolve_data_config({}, model=model))
    return torch.stack([transform(Image.fromarray(image)) for image in images])


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Flip and shift each image of a (N, side, side) byte batch by its own draw; zeros move in."""
    n, side = pixels.shape[:2]
    shift = MAX_SHIFT * side // SIZE
    padded = F.pad(pixels, (shift,) * 4)
    offsets = torch.randint(0, 2 * shift + 1, (2, n, 1), generator=generator)
    rows, columns = torch.arange(side) + offsets
    flip = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Percentage of the (N, 1, SIZE, SIZE) inputs that the network labels rightly."""
    model.eval()
    predicted = torch.cat([model(batch).argmax(1) for batch in torch.split(inputs, 250)])
    return 100 * (predicted == labels).double().mean().item()


def train_(
    model: nn.Module,
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    n_epochs: int,
    seed: int,
) -> nn.Module:
    """Train by SGD under a one-cycle learning rate, printing a line an epoch.

    Both sets are (N, SIZE, SIZE) bytes and (N,) labels.
    """
    pixels, labels = train
    generator = torch.Generator().manual_seed(seed)
    n_steps = len(pixels) // BATCH_SIZE
    optimizer = torch.optim.SGD(
        model.parameters(), MAX_LR, momentum=0.9, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    # With cycle_momentum the momentum would drop where the rate is high; 0.9 throughout is enough.
    scheduler = OneCycleLR(
        optimizer, MAX_LR, total_steps=n_epochs * n_steps, pct_start=0.25, cycle_momentum=False
    )
    started = time.perf_counter()
    for epoch in range(1, n_epochs + 1):
        model.train()
        order = torch.randperm(len(pixels), generator=generator)
        total_loss = 0.0
        for chosen in torch.split(order[: n_steps * BATCH_SIZE], BATCH_SIZE):
            inputs = normalize(augment(pixels[chosen], generator))
            logits = model(inputs.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, labels[chosen], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            scheduler.step()
            total_loss += loss.item()
        print(
            f"epoch {epoch:2d}/{n_epochs}  loss {total_loss / n_steps:.4f}"
            f"  validation {accuracy(model, normalize(validation[0]), validation[1]):.2f} %"
            f"  {time.perf_counter() - started:.0f} s",
            flush=True,
        )
    return model


def hub_config(n_features: int) -> dict[str, Any]:
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
    config = json.dumps(hub_config(tensors["fc.weight"].shape[1]), indent=2) + "\n"
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
    """Write labelled test images, as many of each class, in the order of the test split."""
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
    """Write unlabelled images of the part of the training split that the network is trained on."""
    images = read_split(data_dir, "train")[0][:-N_VALIDATION]
    chosen = np.random.default_rng(seed).choice(len(images), n_images, replace=False)
    save_npz(path, images=images[np.sort(chosen)])


def build_network(data_dir: Path, out: Path, n_epochs: int, seed: int) -> None:
    """Train the network, write it to `out`, print how the written one does on the test split."""
    images, label_bytes = read_split(data_dir, "train")
    pixels, labels = scale_up(images), torch.from_numpy(label_bytes.astype(np.int64))
    train = pixels[:-N_VALIDATION], labels[:-N_VALIDATION]
    validation = pixels[-N_VALIDATION:], labels[-N_VALIDATION:]

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
        inputs = timm_inputs(stored, images[-N_VALIDATION:])
        torch.testing.assert_close(normalize(validation[0]), inputs, rtol=0, atol=1e-5)
        print(
            f"validation: trained {accuracy(model, inputs, validation[1]):.2f} %,"
            f" stored in fp16 {accuracy(stored, inputs, validation[1]):.2f} %"
        )
        test_images, test_bytes = read_split(data_dir, "t10k")
        inputs = timm_inputs(stored, test_images)
        test_labels = torch.from_numpy(test_bytes.astype(np.int64))
        print(
            f"test: trained {accuracy(model, inputs, test_labels):.2f} %,"
            f" stored in fp16 {accuracy(stored, inputs, test_labels):.2f} %"
        )
        out.mkdir(exist_ok=True)
        for name in ("model.safetensors", "config.json"):
            os.replace(folder / name, out / name)
    print(f"wrote {out}")


def parse_args() -> argparse.Namespace:
    """Read the command line; refuse to overwrite anything unless told to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the four idx.gz")
    parser.add_argument("--out", type=Path, required=True, help="timm hub folder to write")
    parser.add_argument("--epochs", type=int, default=18, help="0 trains and writes no network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="other counts round otherwise")
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
        parser.error(f"--sample must be a multiple of {len(CLASSES)}, one share for each class")
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
