"""Views of photos: some to calibrate with, others to judge by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from legocompress.calibrate.crops import random_crop

UNSEEN = 3  # one photo of this many is never calibrated with


def draw_views(
    network: nn.Module, folder: Path, n_views: int, seed: int, use_all: bool = False
) -> tuple[Tensor, Tensor]:
    """Random crops of photos to calibrate with, and half as many crops of other photos.

    Args:
        network: whose preprocessing is used.
        folder: of photos, .jpg.
        n_views: how many to calibrate with.
        seed: of the crops.
        use_all: calibrate with all photos; the second tensor is empty then.
    """
    paths = sorted(folder.glob("*.jpg"))
    if not paths:
        raise SystemExit(f"there is no .jpg in {folder}")
    transform = random_crop(create_transform(**resolve_data_config({}, model=network)))
    unseen = [] if use_all else paths[UNSEEN - 1 :: UNSEEN]
    calibration_paths = [path for path in paths if path not in unseen]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        both = [
            [_open_view(chosen[n % len(chosen)], transform) for n in range(count)]
            for chosen, count in (
                (calibration_paths, n_views),
                (unseen, n_views // 2 if unseen else 0),
            )
        ]
    return torch.stack(both[0]), torch.stack(both[1]) if both[1] else torch.empty(0)


def _open_view(path: Path, transform: Any) -> Tensor:
    with Image.open(path) as image:
        view: Tensor = transform(image.convert("RGB"))
    return view
