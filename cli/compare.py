"""`compare`: compressed folders, dense networks and ONNX files side by side."""

from __future__ import annotations

from functools import partial

import click
import torch
from rich.progress import Progress, TaskID

import legocompress as lego
from legocompress.data.images import Images
from legocompress.errors import UsageError
from legocompress.report.compare import Comparison, compare_networks
from legocompress.report.contestants import Contestant, find_preprocessing, open_contestants

from . import render
from .help import SectionedCommand
from .json_log import log_json_option
from .options import json_option, workers_option
from .progress import progress_bar


@click.command(cls=SectionedCommand)
@click.argument("names", metavar="A B ...", nargs=-1, required=True)
@click.option("--data", help="Images to measure the agreement with the first network on.")
@click.option("--labelled", metavar="DATA", help="Labelled images to measure top-1 on.")
@click.option(
    "--class-map",
    metavar="FILE",
    help="Text file: the class folders of --labelled, in the order of the outputs.",
)
@click.option("--batch", type=click.IntRange(1), default=1, help="Number of images per timed run.")
@click.option("--threads", type=click.IntRange(1), help="Number of CPU threads. [default: all]")
@click.option("--rounds", type=click.IntRange(2), default=15, help="Number of timed runs of each.")
@workers_option
@log_json_option
@json_option
def compare(
    names: tuple[str, ...],
    data: str | None,
    labelled: str | None,
    class_map: str | None,
    batch: int,
    threads: int | None,
    rounds: int,
    workers: int,
    as_json: bool,
) -> None:
    """Compare networks on this CPU: bytes, MACs, latency, agreement with the first, top-1.

    A B ... are compressed folders, names of dense networks, and ONNX files.
    """
    if len(names) < 2:
        raise UsageError("compare takes two networks or more; name another one")
    if class_map is not None and labelled is None:
        raise UsageError("--class-map gives the order of the classes of --labelled; give both")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        contestants = open_contestants(names)
        photos = _open(data, contestants, None, labels=False)
        labelled_images = _open(labelled, contestants, class_map, labels=True)
        with progress_bar(as_json) as bar:
            show_step = partial(_show_step, bar, {})
            comparison = compare_networks(
                contestants, photos, labelled_images, batch, rounds, workers, show_step
            )
    finally:
        torch.set_num_threads(before)
    _print(comparison, as_json)


def _show_step(bar: Progress, tasks: dict[str, TaskID], step: str, done: int, total: int) -> None:
    """Move the bar of a step, which is added when the step begins."""
    if step not in tasks:
        tasks[step] = bar.add_task(step, total=total)
    bar.update(tasks[step], completed=done, total=total)


def _open(
    where: str | None, contestants: list[Contestant], class_map: str | None, labels: bool
) -> Images | None:
    """Open images with the preprocessing of the first network that names one.

    Raises:
        UsageError: no network names one, or labels are missing.
    """
    if where is None:
        return None
    network = find_preprocessing(contestants)
    images = lego.open_images(where, network, class_map=class_map, labels=labels)
    if labels and not images.labelled:
        raise UsageError(f"--labelled: {where!r} has no labels to measure accuracy with")
    return images


def _print(comparison: Comparison, as_json: bool) -> None:
    if as_json:
        render.print_json(comparison.to_dict())
    else:
        render.print_comparison(comparison)
