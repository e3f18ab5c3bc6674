"""`calibrate`: repair a compressed folder with unlabelled images, as `convert --calibrate` does."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn

import legocompress as lego
from legocompress.calibrate.calibration import FEWEST
from legocompress.calibrate.crops import open_crops
from legocompress.checkpoint import check_target
from legocompress.data.images import Images
from legocompress.errors import UsageError
from legocompress.models.source import source_of
from legocompress.state.calibration import LabelledCheck

from . import render
from .options import (
    calibration_options,
    device_option,
    force_option,
    json_option,
    original_of,
    original_options,
    progress,
    read_device,
)

SYNTHETIC = "synthetic"
FEW = 256  # photos, below which crops are advised


@dataclass(frozen=True)
class Request:
    """What the options of a calibration ask for."""

    where: str
    images: int
    crops: int
    epochs: int
    batch_size: int
    workers: int
    data_dir: str | None
    split: str
    labelled: str | None
    seed: int


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--data",
    required=True,
    help="Image folder, .npz file, or timm data set; or 'synthetic' for none at all.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder to write. [default: CKPT-calibrated]"
)
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, help="Of all that is random.")
@calibration_options
@original_options
@device_option
@force_option
@json_option
def calibrate(
    checkpoint: Path,
    data: str,
    out: Path | None,
    seed: int,
    original: str | None,
    original_weights: Path | None,
    device: str,
    force: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Repair the compressed folder CHECKPOINT with unlabelled images, towards its original."""
    target = out or Path(f"{str(checkpoint).rstrip('/')}-calibrated")
    check_target(target, force)
    place = read_device(device)
    network = lego.load(checkpoint).to(place)
    teacher = original_of(network, original, original_weights)
    if teacher is None:
        teacher = _named_original(network)
    if source_of(network).reparameterized:
        teacher = reparameterize_model(teacher)
    request = Request(data, seed=seed, **read_calibration(values))
    record = run(network, teacher.to(place), request, target, as_json)
    lego.save(network, target, force)
    finish(target)
    if as_json:
        render.print_json({"out": str(target), **record.model_dump()})
        return
    render.print_repairs(record)
    render.print_calibration(record)
    click.echo(f"\nNext: legocompress report {target}")


def read_calibration(values: dict[str, Any]) -> dict[str, Any]:
    """Take the options of a calibration out of a command's values."""
    names = ("images", "crops", "epochs", "batch_size", "workers", "data_dir", "split", "labelled")
    return {name: values.pop(name) for name in names}


def _named_original(network: nn.Module) -> nn.Module:
    """The original by the name that it was converted from."""
    source = source_of(network)
    if source.library is None or source.weights.partition(" ")[0] in ("file", "random,", "unknown"):
        raise UsageError(
            f"the original's weights are of {source.weights!r}, which is no name to load it by; "
            "give it with --original or --original-weights"
        )
    return lego.create(source.weights, model_args=source.model_args)


def run(
    network: nn.Module, original: nn.Module, request: Request, target: Path, quiet: bool
) -> lego.Calibration:
    """Calibrate with a bar, and tell accuracies where labelled images are given.

    Raises:
        UsageError: crops of synthetic images, or `labelled` images without labels.
    """
    if request.where == SYNTHETIC and request.crops > 1:
        raise UsageError("--crops takes parts of photos; leave it out with synthetic images")
    if request.labelled is None:
        return _repair(network, original, request, target, quiet)
    images = _labelled(original, request.labelled, request.data_dir)

    def judge(teacher: nn.Module | None) -> lego.Evaluation:
        batches = images.batches(request.batch_size, request.workers)
        return lego.evaluate(network, batches, teacher, images.n_classes)

    before = judge(original)
    record = _repair(network, original, request, target, quiet)
    told = LabelledCheck(
        images=before.images,
        original=_known(before.original_top1),
        before=_known(before.top1),
        after=_known(judge(None).top1),
    )
    return _noted(network, record, accuracy=told)


def _noted(network: nn.Module, record: lego.Calibration, **more: Any) -> lego.Calibration:
    """The record with more in it, which the network keeps."""
    record = record.model_copy(update=more)
    lego.lego_state(network).calibration = record
    return record


def _repair(
    network: nn.Module, original: nn.Module, request: Request, target: Path, quiet: bool
) -> lego.Calibration:
    """Calibrate with a bar; layers done are kept beside `target` until `finish`."""
    synthetic = request.where == SYNTHETIC
    with progress(quiet) as bar:
        make = _synthesise if synthetic else _read
        images = make(original, request, bar)
        layers = bar.add_task("layers", total=sum(1 for _ in lego.lego_modules(network)))
        tuning = bar.add_task("all together", total=None, visible=request.epochs > 0)
        try:
            record = lego.calibrate_(
                network,
                original,
                images,
                seed=request.seed,
                epochs=request.epochs,
                batch_size=request.batch_size,
                synthetic=synthetic,
                journal=_journal(target),
                on_layer=lambda row: bar.advance(layers),
                on_batch=lambda done, of: bar.update(tuning, completed=done, total=of),
            )
        except KeyboardInterrupt:
            click.echo(
                f"The layers done are kept in {_journal(target)}; the same command goes on there.",
                err=True,
            )
            raise
    return _noted(network, record, crops=request.crops)


def _labelled(original: nn.Module, where: str, data_dir: str | None) -> Images:
    images = lego.open_images(where, original, data_dir)
    if not images.labelled:
        raise UsageError(f"--labelled: {where!r} has no labels to tell accuracy by")
    return images


def _known(top1: float | None) -> float:
    assert top1 is not None
    return top1


def _journal(target: Path) -> Path:
    return target.with_name(f"{target.name}.calibrating")


def finish(target: Path) -> None:
    """Remove the layers kept for an interrupted run: the output stands."""
    shutil.rmtree(_journal(target), ignore_errors=True)


def _read(original: nn.Module, request: Request, bar: Any) -> Tensor:
    images = open_crops(
        request.where,
        original,
        request.images,
        request.crops,
        request.seed,
        request.data_dir,
        request.split,
    )
    if FEWEST <= images.size < min(FEW, request.images) and request.crops == 1:
        click.echo(
            f"{images.size} images are few: --crops {-(-FEW // images.size)} would take as many "
            "random crops of each",
            err=True,
        )
    task = bar.add_task("reading images", total=images.size)

    def batches() -> Any:
        for batch, _ in images.batches(request.batch_size, request.workers):
            yield batch
            bar.advance(task, len(batch))

    return lego.gather(batches(), images.size)


def _synthesise(original: nn.Module, request: Request, bar: Any) -> Tensor:
    task = bar.add_task("shaping noise", total=None)
    with torch.random.fork_rng(devices=[]):
        return lego.synthesise(
            original,
            request.images,
            request.seed,
            request.batch_size,
            on_step=lambda done, of: bar.update(task, completed=done, total=of),
        )
