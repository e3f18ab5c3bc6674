"""`finetune`: train a compressed folder by a recipe."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from timm.utils import reparameterize_model
from torch import nn

import legocompress as lego
from legocompress.checkpoint import CONFIG
from legocompress.data.images import Images
from legocompress.errors import UsageError
from legocompress.finetune.distributed import (
    Processes,
    has_restarted,
    join_process_group,
    read_processes,
)
from legocompress.finetune.epoch import Epoch
from legocompress.finetune.loggers import TRACKERS, Logger, open_logger
from legocompress.finetune.original import create_original
from legocompress.finetune.run_folder import BEST
from legocompress.models.source import source_of
from legocompress.report.html import is_original

from . import render
from .help import SectionedCommand
from .html_page import write_page
from .json_log import current_log, log_json_option
from .options import (
    check_html_target,
    force_option,
    html_option,
    json_option,
    open_original,
    original_options,
    read_device,
    workers_option,
)
from .training_display import TrainingDisplay


@click.command(cls=SectionedCommand)
@click.argument("checkpoint", metavar="CKPT")
@click.option(
    "--recipe", "recipe_name", required=True, help="Name of a shipped recipe, or a .yaml file."
)
@click.option(
    "--data-dir",
    required=True,
    help="Folder of images (train/, validation/), .npz file, idx.gz folder, or a data set's root.",
)
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change the recipe by dotted path (optimizer.lr=0.01, stages.0.epochs=2, ema=null); "
    "repeatable.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write. [default: CKPT-ft]")
@click.option("--resume", is_flag=True, help="Continue the run in --out, if there is one.")
@original_options
@click.option(
    "--num-classes",
    type=click.IntRange(1),
    help="Replace the classifier with a new one for this many classes.",
)
@workers_option
@click.option("--tensorboard", is_flag=True, help="The same as --log-to tensorboard.")
@click.option(
    "--log-to",
    type=click.Choice(list(TRACKERS)),
    multiple=True,
    help="Send the numbers of each epoch to this tracker, too; repeatable.",
)
@log_json_option
@click.option("--device", help="Device to compute on. [default: cuda if there is one, else cpu]")
@html_option
@force_option
@json_option
def finetune(
    checkpoint: str,
    recipe_name: str,
    data_dir: str,
    changes: tuple[str, ...],
    out: Path | None,
    resume: bool,
    original: str | None,
    original_weights: Path | None,
    num_classes: int | None,
    workers: int,
    tensorboard: bool,
    log_to: tuple[str, ...],
    device: str | None,
    html: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Fine-tune CKPT, a compressed folder, by a recipe.

    The run's folder gets best/ and last/, which are compressed folders, args.yaml, summary.csv, and
    the state that --resume continues from. Under torchrun all its processes train together.
    """
    recipe = lego.load_recipe(recipe_name, changes)
    _check_compressed_folder(checkpoint)
    target = out or Path(f"{checkpoint.rstrip('/')}-ft")
    check_html_target(html, force or resume, target)
    processes = read_processes()
    torch_device = _choose_device(device, processes)
    network = lego.load(checkpoint)
    teacher = None
    if recipe.distill is not None:
        teacher = _open_teacher(network, original, original_weights).to(torch_device)
    if num_classes is not None:
        lego.reset_classifier_(network, num_classes, recipe.seed)
    train, validation = lego.open_training(network, recipe, data_dir)
    run_args = {
        "checkpoint": checkpoint,
        "data_dir": data_dir,
        "workers": workers,
        "processes": processes.size,
        "device": str(torch_device),
        "original": original,
        "num_classes": num_classes,
        "lego_version": lego.__version__,
    }
    quiet = as_json or not processes.first
    loggers: list[Logger] = []
    if processes.first:
        names = {*log_to, "tensorboard"} if tensorboard else set(log_to)
        loggers = _open_loggers(sorted(names), target, {**run_args, "recipe": recipe_name})
    with join_process_group(processes, torch_device), TrainingDisplay(quiet, loggers) as display:
        lego.finetune_(
            network.to(torch_device),
            recipe,
            train,
            validation,
            teacher,
            target,
            resume or has_restarted(),
            force,
            run_args,
            processes,
            workers,
            display.show_step,
            display.record_epoch,
        )
    if processes.first:
        if html is not None:
            _write_best_page(html, target, teacher, validation, force or resume, as_json)
        _print_result(target, display.epochs, as_json)


def _check_compressed_folder(checkpoint: str) -> None:
    if not (Path(checkpoint) / CONFIG).is_file():
        raise UsageError(
            f"{checkpoint!r} is not a compressed folder; make one with `legocompress convert`"
        )


def _choose_device(name: str | None, processes: Processes) -> torch.device:
    """The device that is named, or a GPU if there is one; under torchrun one GPU per process."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and processes.size > 1:
        name = f"cuda:{processes.local_rank}"
        torch.cuda.set_device(processes.local_rank)
    return read_device(name)


def _open_teacher(network: nn.Module, original: str | None, weights: Path | None) -> nn.Module:
    """Open the original network, by default the one that the compressed folder records."""
    teacher = open_original(network, original, weights)
    if teacher is None:
        teacher = create_original(network)
    if source_of(network).reparameterized:
        teacher = reparameterize_model(teacher)
    return teacher


def _write_best_page(
    html: Path,
    target: Path,
    teacher: nn.Module | None,
    validation: Images,
    force: bool,
    quiet: bool,
) -> None:
    """Write the HTML page of the best epoch, compared with the teacher if that is the original."""
    best = target / BEST
    network = lego.load(best)
    if teacher is not None:
        network = network.to(next(teacher.parameters()).device)
        teacher = teacher if is_original(network, teacher) else None
    sources = lego.ReportSources(teacher, validation, run_folder=target)
    write_page(network, html, lego.measure(network, path=best), sources, force, quiet)


def _open_loggers(names: list[str], target: Path, settings: dict[str, Any]) -> list[Logger]:
    """Open the trackers of these names, and the log of --log-json if there is one."""
    loggers = [open_logger(name, target, settings) for name in names]
    log = current_log()
    return loggers if log is None else [*loggers, log]


def _print_result(target: Path, epochs: list[Epoch], as_json: bool) -> None:
    if as_json:
        render.print_json({"out": str(target), "epochs": [asdict(epoch) for epoch in epochs]})
        return
    if not epochs:
        click.echo(f"{target} is done already; nothing was left to train.")
    click.echo(f"best epoch: {target / 'best'}, last epoch: {target / 'last'}")
    click.echo(f"\nNext: legocompress report {target / 'best'}")
