"""A calibration run: read or synthesise images, calibrate with progress bars, measure accuracy."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from rich.progress import Progress
from torch import Tensor, nn

import legocompress as lego
from legocompress.calibrate.calibration import FEWEST
from legocompress.calibrate.crops import open_crops
from legocompress.data.images import Images, read_class_names
from legocompress.errors import UsageError
from legocompress.state.calibration import LabelledCheck

from .options import CalibrationRequest
from .progress import progress_bar

SYNTHETIC = "synthetic"
CROPS_ADVISED_BELOW = 256  # photos
FEWEST_MEASURED = 30  # photos, below which weights tell better how to spend a budget
IMAGES_MEASURED = 384  # of the calibration images, to measure what each layer matters


def run_calibration(
    network: nn.Module,
    original: nn.Module,
    request: CalibrationRequest,
    labelled: Images | None,
    target: Path,
    quiet: bool,
    images: Tensor | None = None,
) -> lego.Calibration:
    """Calibrate a network in place, and measure its accuracy if labelled images are given.

    Args:
        network: the compressed network.
        original: the network that it was converted from.
        request: what the options ask for.
        labelled: what `open_labelled` returned.
        target: the folder that will be written; finished layers are stored next to it until
            `remove_journal`.
        quiet: show no progress bar.
        images: what `open_calibration_images` returned; by default it is called.

    Raises:
        UsageError: crops of synthetic images.
    """
    if images is None:
        images = open_calibration_images(original, request, quiet)
    if labelled is None:
        return _calibrate(network, original, request, target, quiet, images)

    def evaluate(teacher: nn.Module | None) -> lego.Evaluation:
        batches = labelled.batches(request.batch_size, request.workers)
        with progress_bar(quiet) as bar:
            task = bar.add_task("labelled images", total=labelled.size)
            return lego.evaluate(
                network,
                batches,
                teacher,
                labelled.n_classes,
                lambda n_images: bar.advance(task, n_images),
            )

    before = evaluate(original)
    record = _calibrate(network, original, request, target, quiet, images)
    accuracy = LabelledCheck(
        images=before.images,
        original=_require_accuracy(before.original_top1),
        before=_require_accuracy(before.top1),
        after=_require_accuracy(evaluate(None).top1),
    )
    return _update_record(network, record, accuracy=accuracy)


def open_calibration_images(
    original: nn.Module, request: CalibrationRequest, quiet: bool
) -> Tensor:
    """Read or synthesise the images to calibrate with: (N, c, H, W), preprocessed.

    Raises:
        UsageError: crops of synthetic images.
        DataError: the images cannot be read, or are too few.
    """
    if request.data == SYNTHETIC and request.crops > 1:
        raise UsageError("--crops takes parts of photos; leave it out with synthetic images")
    make_images = _synthesise_images if request.data == SYNTHETIC else _read_photos
    with progress_bar(quiet) as bar:
        return make_images(original, request, bar)


def measure_sensitivity(
    network: nn.Module,
    spec: lego.LegoSpec,
    images: Tensor,
    request: CalibrationRequest,
    target: Path | None,
    quiet: bool,
) -> lego.Sensitivity | None:
    """Measure how much each layer matters, by which a budget is spent.

    Args:
        network: the dense network.
        spec: which layers.
        images: to calibrate with; the first of them are used.
        request: what the options ask for.
        target: the folder that will be written; finished layers are stored next to it.
        quiet: show no progress bar.

    Returns:
        None, with one line on standard error, where the images are synthetic or too few.
    """
    if request.data == SYNTHETIC or len(images) < FEWEST_MEASURED:
        click.echo(
            f"the budget is spent by the errors of the weights, since fewer than {FEWEST_MEASURED} "
            "photos are there to measure what each layer matters",
            err=True,
        )
        return None
    with progress_bar(quiet) as bar:
        task = bar.add_task("measuring layers", total=None)
        return lego.sensitivity(
            network,
            images[:IMAGES_MEASURED],
            spec,
            batch_size=request.batch_size,
            seed=request.seed,
            journal=None if target is None else _journal_folder(target) / "sensitivity",
            on_layer=lambda done, total: bar.update(task, completed=done, total=total),
        )


def open_labelled(original: nn.Module, request: CalibrationRequest) -> Images | None:
    """Open the images to measure accuracy on; None if the request names none.

    Raises:
        UsageError: the images have no labels.
        DataError: the classes do not fit the outputs of the original, among others.
    """
    if request.labelled is None:
        return None
    images = lego.open_images(
        request.labelled, original, request.data_dir, class_map=request.class_map
    )
    if not images.labelled:
        raise UsageError(f"--labelled: {request.labelled!r} has no labels to measure accuracy with")
    if images.n_classes is not None:  # one image shows the number of outputs
        lego.evaluate(original, images.sample(1).batches(1), n_classes=images.n_classes)
    return images


def make_page_sources(original: nn.Module, request: CalibrationRequest) -> lego.ReportSources:
    """Collect what the HTML page of a calibrated network shows beside the network.

    The page compares both networks on the labelled images, if given, else on the photos that the
    calibration has used.
    """
    class_names = None if request.class_map is None else read_class_names(Path(request.class_map))
    photos = None
    if request.labelled is not None:
        photos = lego.open_images(request.labelled, original, request.data_dir, labels=False)
    elif request.data != SYNTHETIC:
        photos = lego.open_images(
            request.data, original, request.data_dir, request.split, labels=False
        )
    return lego.ReportSources(
        original, photos, photos_calibrated=request.labelled is None, class_names=class_names
    )


def remove_journal(target: Path) -> None:
    """Remove the finished layers that were stored for a resume, once `target` is written."""
    shutil.rmtree(_journal_folder(target), ignore_errors=True)


def _journal_folder(target: Path) -> Path:
    return target.with_name(f"{target.name}.calibrating")


def _calibrate(
    network: nn.Module,
    original: nn.Module,
    request: CalibrationRequest,
    target: Path,
    quiet: bool,
    images: Tensor,
) -> lego.Calibration:
    """Calibrate with progress bars; finished layers are stored for a resume."""
    with progress_bar(quiet) as bar:
        layers = bar.add_task("layers", total=sum(1 for _ in lego.lego_modules(network)))
        joint = bar.add_task("all together", total=None, visible=request.epochs > 0)
        try:
            record = lego.calibrate_(
                network,
                original,
                images,
                seed=request.seed,
                epochs=request.epochs,
                batch_size=request.batch_size,
                synthetic=request.data == SYNTHETIC,
                journal=_journal_folder(target),
                on_layer=lambda row: bar.advance(layers),
                on_batch=lambda done, total: bar.update(joint, completed=done, total=total),
            )
        except KeyboardInterrupt:
            click.echo(
                f"The finished layers are stored in {_journal_folder(target)}; the same command "
                "continues from there.",
                err=True,
            )
            raise
    return _update_record(network, record, crops=request.crops)


def _update_record(
    network: nn.Module, record: lego.Calibration, **changes: Any
) -> lego.Calibration:
    """Change fields of the calibration record, and attach the new record to the network."""
    record = record.model_copy(update=changes)
    lego.lego_state(network).calibration = record
    return record


def _require_accuracy(top1: float | None) -> float:
    assert top1 is not None  # the images have labels
    return top1


def _read_photos(original: nn.Module, request: CalibrationRequest, bar: Progress) -> Tensor:
    """Read the images into one tensor (N, c, H, W), preprocessed for the original."""
    images = open_crops(
        request.data,
        original,
        request.images,
        request.crops,
        request.seed,
        request.data_dir,
        request.split,
    )
    _advise_crops(images.size, request)
    return read_images(images, request.batch_size, request.workers, bar)


def read_images(images: Images, batch_size: int, workers: int, bar: Progress) -> Tensor:
    """Read all images of a data set into one tensor (N, c, H, W), with a progress bar."""
    task = bar.add_task("reading images", total=images.size)

    def batches() -> Iterator[Tensor]:
        for batch, _ in images.batches(batch_size, workers):
            yield batch
            bar.advance(task, len(batch))

    return lego.gather(batches(), images.size)


def _advise_crops(n_images: int, request: CalibrationRequest) -> None:
    """Suggest `--crops` for a small image set."""
    if request.crops > 1 or not FEWEST <= n_images < min(CROPS_ADVISED_BELOW, request.images):
        return
    n_crops = -(-CROPS_ADVISED_BELOW // n_images)
    click.echo(
        f"{n_images} images are few: --crops {n_crops} would take as many random crops of each",
        err=True,
    )


def _synthesise_images(original: nn.Module, request: CalibrationRequest, bar: Progress) -> Tensor:
    """Make images from noise by the original's norm statistics: (N, c, H, W)."""
    task = bar.add_task("shaping noise", total=None)
    with torch.random.fork_rng(devices=[]):
        return lego.synthesise(
            original,
            request.images,
            request.seed,
            request.batch_size,
            on_step=lambda done, total: bar.update(task, completed=done, total=total),
        )
