"""The transform of training images: timm's augmentation, with the recipe's way to crop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torchvision.transforms import Compose, InterpolationMode, RandomCrop, Resize

from legocompress.errors import UsageError
from legocompress.finetune.recipe import Augment


def create_training_transform(model: nn.Module, augment: Augment) -> Callable[[Any], Tensor]:
    """Create the transform from a PIL image to the network's input (c, H, W).

    Each call draws anew from the global generators.

    Raises:
        UsageError: timm refuses the augmentation.
    """
    cfg = resolve_data_config({}, model=model)
    options = augment.model_dump(exclude={"crop", "padding"})
    for key in ("crop_pct", "crop_mode"):
        cfg.pop(key, None)
    try:
        timm_transform: Any = create_transform(**cfg, is_training=True, **options)
        random_crop, *other_steps = timm_transform.transforms
        size = cfg["input_size"][1:]
        resize = Resize(size, InterpolationMode(cfg["interpolation"]))
        if augment.crop == "resized":
            crop_steps = [random_crop]
        elif augment.crop == "shift":
            crop_steps = [resize, RandomCrop(size, padding=augment.padding)]
        else:
            crop_steps = [resize]
        transform: Callable[[Any], Tensor] = Compose([*crop_steps, *other_steps])
        return transform
    # What timm and torchvision raise for arguments that they do not take.
    except (TypeError, ValueError, KeyError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"augment: timm refuses {options}: {error}") from error
