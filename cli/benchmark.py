"""`benchmark`: a compressed folder's speed against the dense network in its strongest forms."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click
import torch
from rich.progress import Progress, TaskID

import legocompress as lego
from legocompress.errors import UsageError
from legocompress.models.probe import default_input
from legocompress.report.rivals import AGAINST, Against
from legocompress.report.versus_dense import BenchmarkRun

from . import render
from .options import SeveralValues, json_option, progress


@click.command(cls=SeveralValues)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--batch", "batches", type=click.IntRange(1), multiple=True, default=(1,), help="Images a run."
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    multiple=True,
    help="CPU threads. [default: all cores]",
)
@click.option(
    "--against",
    type=click.Choice(AGAINST),
    multiple=True,
    default=AGAINST,
    help="Rivals with the dense weights; torchvision's are its own.",
)
@click.option("--img-size", type=click.IntRange(1), help="Height and width of the images.")
@click.option("--rounds", type=click.IntRange(2), default=15, help="Timed runs of each form.")
@click.option(
    "--seconds", type=click.FloatRange(0), default=120.0, help="Time after which no round starts."
)
@click.option("--layers", is_flag=True, help="Show each Lego layer's route and time, too.")
@click.option("--save", is_flag=True, help="Keep the routes that were found, as a hint to deploy.")
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
    if max(threads, default=1) > 4 * torch.get_num_threads():
        raise UsageError(
            f"--threads {max(threads)} is far beyond this machine's {torch.get_num_threads()} cores"
        )
    model = lego.load(checkpoint)
    image = None
    if img_size is not None:
        sample = default_input(model)
        assert sample is not None
        image = torch.zeros(1, sample.shape[1], img_size, img_size)
    runs: list[BenchmarkRun] = []
    for batch in batches:
        for count in threads or (torch.get_num_threads(),):
            with progress(as_json) as bar:
                task = bar.add_task("forms", total=None)
                told = partial(_tell, bar, task)
                runs.append(
                    lego.benchmark(
                        model, batch, count, against, rounds, seconds, image, on_form=told
                    )
                )
            if not as_json:
                render.print_benchmark(runs[-1], layers)
    if save:
        lego.save(model, checkpoint, force=True)
    if as_json:
        render.print_json([run.to_dict() for run in runs])
    elif save:
        click.echo(f"{checkpoint} keeps these routes; deploy_ takes them on such a machine.")


def _tell(bar: Progress, task: TaskID, form: str) -> None:
    bar.update(task, description=form, advance=1)
