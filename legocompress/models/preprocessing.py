"""The preprocessing that a network carries, as timm's `pretrained_cfg` holds it."""

from __future__ import annotations

from typing import Any

import torchvision
from torchvision.transforms import InterpolationMode

from legocompress.errors import UsageError

PREPROCESSING = (
    "input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "fixed_input_size",
)  # fmt: skip


def adapt_to_channels(cfg: dict[str, Any], channels: int | None) -> dict[str, Any]:
    """Adapt a configuration to a number of channels; mean and std become averages over channels."""
    size = cfg.get("input_size")
    if channels is None or not size or size[0] == channels:
        return cfg
    averages = {
        key: (sum(cfg[key]) / len(cfg[key]),) * channels for key in ("mean", "std") if cfg.get(key)
    }
    return {**cfg, **averages, "input_size": (channels, *size[1:])}


def fit_preprocessing(
    changes: dict[str, Any], cfg: dict[str, Any], in_chans: int | None
) -> dict[str, Any]:
    """Complete preprocessing that a user gave for the channels of the network.

    An `input_size` (H, W) gets the channels; a single `mean` or `std` is repeated for each.
    """
    size = tuple(changes.get("input_size") or cfg.get("input_size") or ())
    channels = size[0] if len(size) == 3 else (cfg.get("input_size") or (in_chans or 3,))[0]
    fitted = dict(changes)
    if "input_size" in changes:
        fitted["input_size"] = size if len(size) == 3 else (channels, *size)
    for key in {"mean", "std"} & changes.keys():
        values = tuple(changes[key])
        fitted[key] = values * channels if len(values) == 1 else values
        if len(fitted[key]) != channels:
            raise UsageError(
                f"{key} (--{key}) has {len(values)} values; give one, or one for each of the "
                f"{channels} channels"
            )
    return fitted


def check_preprocessing(changes: dict[str, Any]) -> None:
    """Raise UsageError for a preprocessing key or interpolation that does not exist."""
    unknown = changes.keys() - {*PREPROCESSING, "test_input_size", "test_crop_pct"}
    if unknown:
        raise UsageError(
            f"unknown preprocessing {', '.join(sorted(unknown))}; "
            f"allowed are {', '.join(PREPROCESSING)}"
        )
    modes = sorted(mode.value for mode in InterpolationMode)
    if changes.get("interpolation", "bilinear") not in (*modes, "random"):
        raise UsageError(
            f"interpolation={changes['interpolation']!r}; allowed are {', '.join(modes)}"
        )


def torchvision_cfg(name: str) -> dict[str, Any]:
    """Build a configuration in timm's form from the transforms of a torchvision weights enum."""
    cfg: dict[str, Any] = {"architecture": name}
    # The default is not always the last entry of the enum: RegNets have SWAG weights after it.
    entries: Any = torchvision.models.get_model_weights(name)
    transforms: Any = entries.DEFAULT.transforms() if len(entries) else None
    crop = getattr(transforms, "crop_size", None)
    if not crop:
        return cfg
    return {
        **cfg,
        "input_size": (3, crop[0], crop[0]),
        "crop_pct": crop[0] / transforms.resize_size[0],
        "crop_mode": "center",
        "interpolation": transforms.interpolation.value,
        "mean": tuple(transforms.mean),
        "std": tuple(transforms.std),
    }
