"""`benchmark`: time a compressed folder against the dense network in its strongest forms."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click
import torch
from rich.progress import Progress, TaskID
from torch import Tensor, nn

import legocompress as lego
from legocompress.errors import UsageError
from legocompress.models.probe import default_input
from legocompress.report.rivals import AGAINST, Against
from legocompress.report.versus_dense import BenchmarkRun

from . import render
from .options import SeveralValues, json_option
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
    help="Dense rivals to time; torchvision is that library's own network of the same name.",
)
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
    img_size: int | None,
    rounds: int,
    seconds: float,
    layers: bool,
    save: bool,
    as_json: bool,
) -> None:
    """Time a compressed folder against the dense network in its strongest forms.

    All forms run in turns in one process. --batch, --threads and --against take several values.
    """
    _check_threads(threads)
    model = lego.load(checkpoint)
    image = None if img_size is None else _make_image(model, img_size)
    runs: list[BenchmarkRun] = []
    for batch in batches:
        for n_threads in threads or (torch.get_num_threads(),):
            with progress_bar(as_json) as bar:
                on_form = partial(_show_form, bar, bar.add_task("forms", total=None))
                run = lego.benchmark(
                    model, batch, n_threads, against, rounds, seconds, image, on_form=on_form
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


def _make_image(model: nn.Module, size: int) -> Tensor:
    """One black image (1, c, size, size) with the channels of the network's input."""
    sample = default_input(model)
    assert sample is not None
    return torch.zeros(1, sample.shape[1], size, size)


def _show_form(bar: Progress, task: TaskID, form: str) -> None:
    bar.update(task, description=form, advance=1)
