"""`benchmark`: time a compressed folder against dense forms in fp32, bf16 and int8."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click
import torch
from click.core import ParameterSource
from rich.progress import Progress, TaskID
from torch import Tensor, nn

import legocompress as lego
from legocompress.errors import UsageError
from legocompress.models.probe import default_input
from legocompress.report.benchmark_run import BenchmarkRun
from legocompress.report.rivals import AGAINST, Against, check_packages

from . import render
from .options import (
    SeveralValues,
    create_recorded_original,
    json_option,
    open_original,
    original_options,
)
from .progress import progress_bar


@click.command(cls=SeveralValues)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(1),
    multiple=True,
    default=(1,),
    help="Number of images per run.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    multiple=True,
    help="Number of CPU threads. [default: all cores]",
)
@click.option(
    "--against",
    type=click.Choice(AGAINST),
    multiple=True,
    default=AGAINST,
    help="Dense rivals to time, by default all; torchvision is that library's own network.",
)
@click.option(
    "--data",
    metavar="PHOTOS",
    help="Photos to calibrate int8 rivals with and to judge all forms by.",
)
@click.option("--labelled", metavar="DATA", help="Labelled images to measure top-1 on.")
@click.option(
    "--class-map",
    metavar="FILE",
    help="Text file: the class folders of --labelled, in the order of the outputs.",
)
@original_options
@click.option(
    "--img-size", type=click.IntRange(1), help="Height and width of the images, in pixels."
)
@click.option("--rounds", type=click.IntRange(2), default=15, help="Number of timed runs per form.")
@click.option(
    "--seconds",
    type=click.FloatRange(0),
    default=120.0,
    help="Seconds after which no new round of timed runs starts.",
)
@click.option("--layers", is_flag=True, help="Also show the route and time of each Lego layer.")
@click.option(
    "--save", is_flag=True, help="Save the fastest routes in the folder, as a hint for deploy_."
)
@json_option
def benchmark(
    checkpoint: Path,
    batches: tuple[int, ...],
    threads: tuple[int, ...],
    against: tuple[Against, ...],
    data: str | None,
    labelled: str | None,
    class_map: str | None,
    original: str | None,
    original_weights: Path | None,
    img_size: int | None,
    rounds: int,
    seconds: float,
    layers: bool,
    save: bool,
    as_json: bool,
) -> None:
    """Time a compressed folder against the dense network in fp32, bf16 and int8.

    All forms run in turns in one process. --batch, --threads and --against take several values.
    With --data, int8 forms are calibrated with photos, and accuracy stands beside the speed.
    """
    _check_threads(threads)
    _check_photo_options(data, labelled, class_map, original, original_weights, img_size)
    if click.get_current_context().get_parameter_source("against") != ParameterSource.DEFAULT:
        check_packages(against)
    model = lego.load(checkpoint)
    judge = None
    if data is not None:
        teacher = open_original(model, original, original_weights)
        teacher = create_recorded_original(model) if teacher is None else teacher
        judge = lego.open_judge(teacher.eval(), data, labelled, class_map)
    image = None if img_size is None else _make_image(model, img_size)
    runs: list[BenchmarkRun] = []
    for batch in batches:
        for n_threads in threads or (torch.get_num_threads(),):
            with progress_bar(as_json) as bar:
                on_form = partial(_show_form, bar, bar.add_task("forms", total=None))
                run = lego.benchmark(
                    model,
                    batch,
                    n_threads,
                    against,
                    rounds,
                    seconds,
                    image,
                    on_form=on_form,
                    judge=judge,
                )
            runs.append(run)
            if not as_json:
                render.print_benchmark(run, layers)
    if save:
        lego.save(model, checkpoint, force=True)
    if as_json:
        render.print_json([run.to_dict() for run in runs])
    elif save:
        click.echo(f"{checkpoint} keeps these routes; deploy_ takes them on such a machine.")


def _check_threads(threads: tuple[int, ...]) -> None:
    n_cores = torch.get_num_threads()
    if max(threads, default=1) > 4 * n_cores:
        raise UsageError(
            f"--threads {max(threads)} is far more than this machine's {n_cores} cores"
        )


def _check_photo_options(
    data: str | None,
    labelled: str | None,
    class_map: str | None,
    original: str | None,
    original_weights: Path | None,
    img_size: int | None,
) -> None:
    """Raise UsageError for an option of the accuracy that lacks the option which it is about."""
    needs_data = {
        "--labelled": labelled,
        "--original": original,
        "--original-weights": original_weights,
    }
    for name, value in needs_data.items():
        if value is not None and data is None:
            raise UsageError(f"{name} is about accuracy, which needs photos; give --data PHOTOS")
    if class_map is not None and labelled is None:
        raise UsageError(
            "--class-map gives the order of the classes of --labelled; give --labelled DATA, too"
        )
    if data is not None and img_size is not None:
        raise UsageError(
            "--data takes photos at the image size of the network; leave out --img-size or --data"
        )


def _make_image(model: nn.Module, size: int) -> Tensor:
    """One black image (1, c, size, size) with the channels of the network's input."""
    sample = default_input(model)
    assert sample is not None
    return torch.zeros(1, sample.shape[1], size, size)


def _show_form(bar: Progress, task: TaskID, form: str) -> None:
    bar.update(task, description=form, advance=1)
