"""`evaluate`: accuracy on labelled images, agreement with the original on any images."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

import legocompress as lego
from legocompress.errors import UsageError

from . import render
from .options import (
    device_option,
    json_option,
    model_options,
    original_of,
    original_options,
    progress,
    read_create_args,
    read_device,
)


@click.command()
@click.argument("model")
@click.option(
    "--data", required=True, help="Image folder, .npz file, or timm data set (torch/cifar10)."
)
@click.option("--data-dir", help="Root of a named data set.")
@click.option("--split", default="validation", help="Split of a named data set.")
@click.option("--class-map", help="Text file: class folder names in the order of the outputs.")
@click.option("--no-labels", is_flag=True, help="Ignore labels; agreement alone.")
@original_options
@click.option(
    "-b", "--batch-size", type=click.IntRange(1), default=64, help="Images that run at once."
)
@click.option(
    "-j", "--workers", type=click.IntRange(0), default=0, help="Processes that read images."
)
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
    place = read_device(device)
    network = lego.open_model(model, **read_create_args(values)).to(place)
    teacher = original_of(network, original, original_weights)
    images = lego.open_images(data, network, data_dir, split, class_map, not no_labels)
    if not images.labelled and teacher is None:
        raise UsageError(
            f"{data!r} has no labels, so there is nothing to measure without the original network; "
            "give --original NAME or --original-weights FILE"
        )
    with progress(as_json) as bar:
        task = bar.add_task("images", total=images.size)
        found = lego.evaluate(
            network,
            images.batches(batch_size, workers),
            None if teacher is None else teacher.to(place),
            images.n_classes,
            lambda done: bar.advance(task, done),
        )
    if as_json:
        render.print_json(asdict(found))
    else:
        render.print_evaluation(found)
