"""Options that say how to create a network: weights, architecture arguments, preprocessing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import yaml

from legocompress.errors import SpecError, UsageError

from .common import CommandT, combine_options

model_options: Callable[[CommandT], CommandT] = combine_options(
    [
        click.option(
            "--weights",
            type=click.Path(path_type=Path),
            help="State dict file (safetensors or torch) to load instead of the library's weights.",
        ),
        click.option(
            "--pretrained/--no-pretrained",
            default=True,
            show_default=True,
            help="Load the library's pretrained weights, or start from random weights.",
        ),
        click.option(
            "--num-classes", type=click.IntRange(0), help="Number of outputs of the classifier."
        ),
        click.option(
            "--in-chans",
            type=click.IntRange(1),
            help="Number of channels of the input image (timm models only).",
        ),
        click.option(
            "--model-kwargs",
            multiple=True,
            metavar="KEY=VALUE",
            help="Extra argument of the architecture, its value read as YAML; repeatable.",
        ),
        click.option(
            "--img-size", type=click.IntRange(1), help="Height and width of the input, in pixels."
        ),
        click.option(
            "--mean",
            type=float,
            multiple=True,
            help="Mean to normalise images with; give it once, or once per channel.",
        ),
        click.option(
            "--std",
            type=float,
            multiple=True,
            help="Standard deviation to normalise images with; give it once, or once per channel.",
        ),
        click.option(
            "--interpolation", help="How images are resized: bilinear, bicubic, nearest, ..."
        ),
        click.option(
            "--crop-pct",
            type=click.FloatRange(0, min_open=True),
            help="Side of the centre crop, as a share of the resized image's shorter side.",
        ),
    ]
)


def read_create_args(values: dict[str, Any]) -> dict[str, Any]:
    """Take the model options out of a command's values, as arguments of `legocompress.create`."""
    size, mean, std = (values.pop(name) for name in ("img_size", "mean", "std"))
    preprocess = {
        "input_size": None if size is None else (size, size),
        "mean": mean or None,
        "std": std or None,
        "interpolation": values.pop("interpolation"),
        "crop_pct": values.pop("crop_pct"),
    }
    return {
        "weights": values.pop("weights"),
        "pretrained": values.pop("pretrained"),
        "num_classes": values.pop("num_classes"),
        "in_chans": values.pop("in_chans"),
        "model_args": dict(_parse_key_value(text) for text in values.pop("model_kwargs")),
        "preprocess": {key: value for key, value in preprocess.items() if value is not None},
    }


def _parse_key_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"--model-kwargs {text!r} is not of the form KEY=VALUE")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise SpecError(f"--model-kwargs {text!r}: the value is not valid YAML") from None
