"""Fashion-MNIST: reading it, preparing its images, training a network on it."""

from __future__ import annotations

import gzip
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

Bytes = npt.NDArray[np.uint8]

LabelledPixels = tuple[Tensor, Tensor]  # bytes (N, side, side) and class numbers (N,)

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


def read_idx(path: Path, n_dims: int) -> Bytes:
    """Read one gzipped idx file of unsigned bytes with `n_dims` dimensions.

    Raises:
        ValueError: the header or the length is not what the format says.
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


def split_validation(pixels: Tensor, labels: Bytes) -> tuple[LabelledPixels, LabelledPixels]:
    """The images to train on, and the last `N_VALIDATION`, to validate on."""
    classes = torch.from_numpy(labels.astype(np.int64))
    train = pixels[:-N_VALIDATION], classes[:-N_VALIDATION]
    return train, (pixels[-N_VALIDATION:], classes[-N_VALIDATION:])


def scale_up(images: Bytes) -> Tensor:
    """Resize (N, 28, 28) bytes to (N, SIZE, SIZE) bytes, by PIL as timm's transform does."""
    size, bilinear = (SIZE, SIZE), Image.Resampling.BILINEAR
    scaled = np.stack([np.asarray(Image.fromarray(i).resize(size, bilinear)) for i in images])
    return torch.from_numpy(scaled)


def normalize(pixels: Tensor) -> Tensor:
    """Turn (N, SIZE, SIZE) bytes into the network's (N, 1, SIZE, SIZE) float input."""
    return pixels.unsqueeze(1).float().div_(255).sub_(MEAN).div_(STD)


def prepare_inputs(model: nn.Module, images: Bytes) -> Tensor:
    """Inputs of a network, (N, 1, side, side), by the preprocessing that its config names."""
    transform = create_transform(**resolve_data_config({}, model=model))
    return torch.stack([transform(Image.fromarray(image)) for image in images])


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Flip and shift each image of a (N, side, side) byte batch at random; zeros move in."""
    n, side = pixels.shape[:2]
    shift = MAX_SHIFT * side // SIZE
    padded = F.pad(pixels, (shift,) * 4)
    offsets = torch.randint(0, 2 * shift + 1, (2, n, 1), generator=generator)
    rows, columns = torch.arange(side) + offsets
    flip = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


@torch.no_grad()
def measure_accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Percentage of the (N, 1, side, side) inputs that the network classifies correctly."""
    model.eval()
    predicted = torch.cat([model(batch).argmax(1) for batch in torch.split(inputs, 250)])
    return 100 * (predicted == labels).double().mean().item()


def train_(
    model: nn.Module,
    train: LabelledPixels,
    validation: LabelledPixels,
    n_epochs: int,
    seed: int,
) -> nn.Module:
    """Train by SGD with a one-cycle learning rate; prints one line per epoch."""
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
            f"  validation {measure_accuracy(model, normalize(validation[0]), validation[1]):.2f} %"
            f"  {time.perf_counter() - started:.0f} s",
            flush=True,
        )
    return model
