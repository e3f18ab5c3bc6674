"""The compressed folder: config.json and model.safetensors, saved and loaded as exact inverses."""

from legocompress.checkpoint.config import (
    CONFIG,
    FORMAT_VERSION,
    TENSORS,
    format_config,
    timm_config,
)
from legocompress.checkpoint.read import load, open_model
from legocompress.checkpoint.write import build_skeleton, check_target, save

__all__ = [
    "CONFIG",
    "FORMAT_VERSION",
    "TENSORS",
    "build_skeleton",
    "check_target",
    "format_config",
    "load",
    "open_model",
    "save",
    "timm_config",
]
