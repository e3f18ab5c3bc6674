"""`evaluate`: accuracy on labelled images, and agreement with the original on any images."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

import legocompress as lego
from legocompress.errors import UsageError

from . import render
from .help import SectionedCommand
from .options import (
    device_option,
    json_option,
    model_options,
    open_original,
    original_options,
    read_create_args,
    read_device,
    workers_option,
)
from .progress import progress_bar


@click.command(cls=SectionedCommand)
@click.argument("model")
@click.option(
    "--data", required=True, help="Image folder, .npz file, or timm data set (torch/cifar10)."
)
@click.option("--data-dir", help="Root folder of a named data set.")
@click.option("--split", default="validation", help="Split of a named data set.")
@click.option(
    "--class-map", help="Text file that lists the class folders in the order of the outputs."
)
@click.option("--no-labels", is_flag=True, help="Ignore labels and measure only the agreement.")
@original_options
@click.option(
    "-b", "--batch-size", type=click.IntRange(1), default=64, help="Number of images per batch."
)
@workers_option
@model_options
@device_option
@json_option
def evaluate(
    model: str,
    data: str,
    data_dir: str | None,
    split: str,
    class_map: str | None,
    no_labels: bool,
    original: str | None,
    original_weights: Path | None,
    batch_size: int,
    workers: int,
    device: str,
    as_json: bool,
    **values: Any,
) -> None:
    """Evaluate MODEL, a compressed folder or any model name, on images."""
    torch_device = read_device(device)
    network = lego.open_model(model, **read_create_args(values)).to(torch_device)
    teacher = open_original(network, original, original_weights)
    images = lego.open_images(data, network, data_dir, split, class_map, not no_labels)
    if not images.labelled and teacher is None:
        raise UsageError(
            f"{data!r} has no labels, so there is nothing to measure without the original network; "
            "give --original NAME or --original-weights FILE"
        )
    with progress_bar(as_json) as bar:
        task = bar.add_task("images", total=images.size)
        evaluation = lego.evaluate(
            network,
            images.batches(batch_size, workers),
            None if teacher is None else teacher.to(torch_device),
            images.n_classes,
            lambda n_images: bar.advance(task, n_images),
        )
    if as_json:
        render.print_json(asdict(evaluation))
    else:
        render.print_evaluation(evaluation)
