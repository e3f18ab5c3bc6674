"""`quantize`: a compressed folder whose maps and weights are 8-bit integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from torch import Tensor, nn

import legocompress as lego
from legocompress.checkpoint import check_target
from legocompress.errors import UsageError
from legocompress.state.quantization import PRECISIONS

from . import render
from .help import SectionedCommand
from .options import CalibrationRequest, force_option, json_option, workers_option
from .progress import progress_bar

N_IMAGES = 128  # that ranges are measured on
precision_option = click.option(
    "--precision",
    default="int8",
    help=f"Precision of maps and weights: {', '.join(PRECISIONS)}.",
)


@click.command(cls=SectionedCommand)
@click.argument("checkpoint")
@click.option("--data", required=True, help="Photos: an image folder, .npz file or timm data set.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder to write. [default: CKPT-int8]"
)
@precision_option
@click.option(
    "--images",
    type=click.IntRange(10),
    default=N_IMAGES,
    help="Number of images to measure ranges on.",
)
@click.option("--data-dir", help="Root folder of a named data set.")
@click.option("--split", default="train", help="Split of a named data set.")
@click.option("-b", "--batch-size", type=click.IntRange(1), default=16, help="Images per batch.")
@workers_option
@force_option
@json_option
def quantize(
    checkpoint: str,
    data: str,
    out: Path | None,
    precision: str,
    images: int,
    data_dir: str | None,
    split: str,
    batch_size: int,
    workers: int,
    force: bool,
    as_json: bool,
) -> None:
    """Quantise CHECKPOINT to 8 bits by unlabelled photos, and write it as a compressed folder.

    CHECKPOINT is a compressed folder, or a network as `convert` takes it.
    """
    check_precision(precision)
    target = out or Path(f"{checkpoint.rstrip('/').rpartition('/')[2]}-{precision}")
    check_target(target, force)
    network = lego.open_model(checkpoint)
    opened = lego.open_images(data, network, data_dir, split=split, labels=False)
    photos = lego.gather(opened.batches(batch_size, workers), images)
    record = run_quantization(network, photos, precision, batch_size, as_json)
    lego.save(network, target, force)
    report = lego.measure(network, path=target)
    if as_json:
        render.print_json({"out": str(target), **report.totals(), **quantization_values(record)})
        return
    click.echo(f"{checkpoint} -> {target}")
    render.print_totals(report)
    print_quantization(record)
    click.echo(f"\nNext: legocompress report {target}")


def open_photos(network: nn.Module, request: CalibrationRequest, precision: str) -> Tensor:
    """The photos of a calibration, whole, at most as many as ranges need."""
    check_precision(precision)
    opened = lego.open_images(
        request.data, network, request.data_dir, split=request.split, labels=False
    )
    batches = opened.batches(request.batch_size, request.workers)
    return lego.gather(batches, min(N_IMAGES, request.images))


def check_precision(precision: str) -> None:
    """Raise UsageError for a precision that does not exist."""
    if precision not in PRECISIONS:
        raise UsageError(f"--precision {precision}: there is {', '.join(PRECISIONS)}")


def run_quantization(
    network: nn.Module, photos: Tensor, precision: str, batch_size: int, quiet: bool
) -> lego.Quantization:
    """Quantise a network in place, with a progress bar."""
    with progress_bar(quiet) as bar:
        tasks: dict[str, Any] = {}

        def on_step(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        lego.quantize_(network, photos, precision, batch_size=batch_size, on_step=on_step)
    record = lego.lego_state(network).quantization
    assert record is not None
    return record


def quantization_values(record: lego.Quantization) -> dict[str, Any]:
    """What scripts read of a quantisation."""
    return {
        "precision": record.precision,
        "method": record.method,
        "images": record.images,
        "error": record.error,
        "agreement": record.agreement,
        "float_layers": record.float_layers,
        "notes": list(record.notes),
    }


def print_quantization(record: lego.Quantization) -> None:
    """Print the precision, how near the outputs come, and what stays in fp32."""
    agreement = "" if record.agreement is None else f", {record.agreement:.1f} % agreement"
    click.echo(
        f"precision {record.precision}: ranges by {record.method} on {record.images} images; "
        f"outputs differ from fp32 by {100 * record.error:.2f} %{agreement}"
    )
    for name, reason in record.float_layers.items():
        click.echo(f"  {name} stays in fp32: {reason}")
    for note in record.notes:
        click.echo(f"  {note}")
