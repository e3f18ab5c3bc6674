"""The compressed folder: config.json and model.safetensors, saved and loaded as exact inverses."""

from legocompress.checkpoint.config import CONFIG, FORMAT_VERSION, TENSORS, config_text, timm_config
from legocompress.checkpoint.read import load, open_model
from legocompress.checkpoint.write import check_target, save, skeleton_of

__all__ = [
    "CONFIG",
    "FORMAT_VERSION",
    "TENSORS",
    "check_target",
    "config_text",
    "load",
    "open_model",
    "save",
    "skeleton_of",
    "timm_config",
]
