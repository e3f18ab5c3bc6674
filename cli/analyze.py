"""`analyze`: how much each layer matters to the outputs, measured on unlabelled photos."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import click

import legocompress as lego
from legocompress.compress.budget import check_budget
from legocompress.errors import UsageError

from . import render
from .calibration import read_images
from .help import SectionedCommand
from .json_log import log_json_option
from .options import (
    device_option,
    json_option,
    model_options,
    read_budget,
    read_create_args,
    read_device,
    read_spec,
    spec_options,
    workers_option,
)
from .progress import progress_bar


@click.command(cls=SectionedCommand)
@click.argument("model")
@click.option("--data", required=True, help="Image folder, .npz file or timm data set; no labels.")
@click.option("--data-dir", help="Root folder of a named data set.")
@click.option("--split", default="train", help="Split of a named data set.")
@click.option("--images", type=click.IntRange(10), default=384, help="Number of images to use.")
@click.option(
    "--journal",
    type=click.Path(path_type=Path),
    help="Folder for finished layers, from which an interrupted run continues.",
)
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, help="Seed of everything random.")
@click.option(
    "-b", "--batch-size", type=click.IntRange(1), default=16, help="Number of images per batch."
)
@workers_option
@spec_options
@model_options
@log_json_option
@device_option
@json_option
def analyze(
    model: str,
    data: str,
    data_dir: str | None,
    split: str,
    images: int,
    journal: Path | None,
    seed: int,
    batch_size: int,
    workers: int,
    device: str,
    as_json: bool,
    **values: Any,
) -> None:
    """Measure what compressing each layer of MODEL alone costs its outputs on unlabelled photos.

    With --max-size or --max-macs it also prints the settings per layer that spend this budget best.
    """
    spec, budget = read_spec(values), read_budget(values)
    network = lego.open_model(model, **read_create_args(values)).to(read_device(device))
    if any(True for _ in lego.lego_modules(network)):
        raise UsageError(f"{model!r} is compressed already; give the original network")
    if budget:
        check_budget(spec, budget)  # before minutes of measuring
    with progress_bar(as_json) as bar:
        photos = lego.open_images(data, network, data_dir, split, labels=False)
        tensor = read_images(photos.sample(images, seed), batch_size, workers, bar)
        task = bar.add_task("layers", total=None)
        found = lego.sensitivity(
            network,
            tensor,
            spec,
            batch_size=batch_size,
            seed=seed,
            journal=journal,
            on_layer=lambda done, total: bar.update(task, completed=done, total=total),
        )
        chosen = None
        if budget:
            sizing = bar.add_task("sizing layers", total=None)
            chosen = lego.allocate(
                network,
                spec,
                **budget,
                seed=seed,
                sensitivity=found,
                on_layer=lambda done, total: bar.update(sizing, completed=done, total=total),
            )
    if journal is not None:
        shutil.rmtree(journal, ignore_errors=True)
    if as_json:
        choice = None if chosen is None else chosen.model_dump(mode="json")
        render.print_json({**found.model_dump(mode="json"), "spec": choice})
        return
    render.print_sensitivity(found, lego.plan(network, spec))
    if chosen is not None:
        render.print_rules(chosen)
