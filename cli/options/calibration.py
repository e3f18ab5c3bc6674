"""Options of a calibration, for `calibrate` and `convert --calibrate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import click
from click.core import ParameterSource

from legocompress.calibrate.calibration import EPOCHS
from legocompress.errors import UsageError

from .common import CommandT, combine_options, workers_option

calibration_options: Callable[[CommandT], CommandT] = combine_options(
    [
        click.option(
            "--images",
            type=click.IntRange(10),
            default=1024,
            help="Number of images to calibrate with.",
        ),
        click.option(
            "--crops",
            type=click.IntRange(1),
            default=1,
            help="Number of random crops per image, for small image sets; 1 keeps images whole.",
        ),
        click.option(
            "--epochs",
            type=click.IntRange(0),
            default=EPOCHS,
            help="Epochs of tuning all layers together; 0 only repairs each layer by itself.",
        ),
        click.option("--data-dir", help="Root folder of a named data set."),
        click.option("--split", default="train", help="Split of a named data set."),
        click.option(
            "--labelled",
            metavar="DATA",
            help="Labelled images to measure accuracy on before and after, not to calibrate on.",
        ),
        click.option(
            "--class-map",
            metavar="FILE",
            help="Text file: the class folders of --labelled, in the order of the outputs.",
        ),
        click.option(
            "-b",
            "--batch-size",
            type=click.IntRange(1),
            default=32,
            help="Number of images per batch.",
        ),
        workers_option,
    ]
)


@dataclass(frozen=True)
class CalibrationRequest:
    """What the options of a calibration ask for.

    Attributes:
        data: an image folder, .npz file or timm data set; or `synthetic`.
        images: number of images to calibrate with.
        crops: random crops per image; 1 for whole images.
        epochs: epochs of tuning all layers together.
        batch_size: images per batch.
        workers: processes that read images.
        data_dir: root folder of a named data set.
        split: split of a named data set.
        labelled: labelled images to measure accuracy on, before and after.
        class_map: file of the class folders of `labelled`, in the order of the outputs.
        seed: seed of everything random.
    """

    data: str
    images: int
    crops: int
    epochs: int
    batch_size: int
    workers: int
    data_dir: str | None
    split: str
    labelled: str | None
    class_map: str | None
    seed: int


def read_calibration(values: dict[str, Any]) -> dict[str, Any]:
    """Take the calibration options out of a command's values, as fields of a request.

    Raises:
        UsageError: a class map is given without labelled images.
    """
    names = {field.name for field in fields(CalibrationRequest)} & values.keys()
    options = {name: values.pop(name) for name in names}
    if options["class_map"] is not None and options["labelled"] is None:
        raise UsageError(
            "--class-map gives the order of the classes of --labelled; give --labelled DATA, too"
        )
    return options


def refuse_calibration_options(options: dict[str, Any]) -> None:
    """Raise UsageError if an option of a calibration is given and no calibration is asked for.

    Args:
        options: what `read_calibration` returned.
    """
    context = click.get_current_context()
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in options and source is ParameterSource.COMMANDLINE:
            raise UsageError(
                f"{max(parameter.opts, key=len)} is an option of the calibration; add --calibrate "
                "DATA, or leave it out"
            )
