"""Networks with a preprocessing, and painted images for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from legocompress.data.images import Images

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def model(**cfg: Any) -> nn.Module:
    """Something that carries a preprocessing configuration."""
    network: Any = nn.Sequential(nn.Conv2d(3, 4, 1))
    network.pretrained_cfg = {
        "input_size": (3, 8, 8),
        "mean": MEAN,
        "std": STD,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        **cfg,
    }
    return network  # type: ignore[no-any-return]


def grey() -> nn.Module:
    return model(input_size=(1, 8, 8), mean=(0.5,), std=(0.25,))


def paint(path: Path, colour: tuple[int, int, int], size: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour).save(path)
    return path


def tensors(images: Images, batch_size: int = 2, workers: int = 0) -> tuple[Tensor, list[int]]:
    batches = list(images.batches(batch_size, workers))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]).tolist()


def normalised(colour: tuple[int, ...]) -> Tensor:
    return (torch.tensor(colour) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)


def npz(tmp_path: Path, **arrays: Any) -> str:
    np.savez(tmp_path / "x.npz", **arrays)
    return str(tmp_path / "x.npz")


EIGHT = np.zeros((2, 8, 8), np.uint8)
