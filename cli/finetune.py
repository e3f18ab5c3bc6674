"""`finetune` and `recipes`: train a converted network by a recipe; what recipes there are."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from timm.utils import reparameterize_model

import legocompress as lego
from legocompress.checkpoint import CONFIG
from legocompress.errors import UsageError
from legocompress.finetune.distributed import (
    Processes,
    has_restarted,
    join_process_group,
    read_processes,
)
from legocompress.finetune.epoch import Epoch
from legocompress.finetune.loop import finetune_
from legocompress.finetune.original import create_original
from legocompress.finetune.progress import Progress as Step
from legocompress.finetune.recipe import Recipe
from legocompress.finetune.recipe_loading import list_shipped_recipes, load_recipe
from legocompress.finetune.training_data import open_training
from legocompress.models.head import reset_classifier_
from legocompress.models.source import source_of

from . import render
from .options import force_option, json_option, original_of, original_options, read_device


@click.command()
@click.argument("checkpoint", metavar="CKPT")
@click.option("--recipe", "recipe_name", required=True, help="Shipped recipe, or a .yaml file.")
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
    help="Change the recipe, by dotted path: optimizer.lr=0.01, stages.0.epochs=2, ema=null.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write. [default: CKPT-ft]")
@click.option("--resume", is_flag=True, help="Go on with the run in --out, if there is one.")
@original_options
@click.option("--num-classes", type=click.IntRange(1), help="Start with a new classifier.")
@click.option(
    "-j", "--workers", type=click.IntRange(0), default=0, help="Processes that read images."
)
@click.option("--tensorboard", is_flag=True, help="Write events for TensorBoard, too.")
@click.option("--device", help="Device to compute on. [default: cuda if there is one, else cpu]")
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
    device: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Fine-tune CKPT, a compressed folder, by a recipe.

    The run's folder gets best/ and last/, which are compressed folders, args.yaml, summary.csv, and
    the state that --resume goes on from. Under torchrun all its processes train together.
    """
    recipe = load_recipe(recipe_name, changes)
    if not (Path(checkpoint) / CONFIG).is_file():
        raise UsageError(f"{checkpoint!r} is no compressed folder; make one with `convert`")
    target = out or Path(f"{checkpoint.rstrip('/')}-ft")
    processes = read_processes()
    place = _device(device, processes)
    network = lego.load(checkpoint)
    teacher = None
    if recipe.distill is not None:
        named = original_of(network, original, original_weights)
        teacher = (create_original(network) if named is None else named).to(place)
        if source_of(network).reparameterized:
            teacher = reparameterize_model(teacher)
    if num_classes is not None:
        reset_classifier_(network, num_classes, recipe.seed)
    train, validation = open_training(network, recipe, data_dir)
    noted = {"checkpoint": checkpoint, "data_dir": data_dir, "workers": workers,
             "processes": processes.size, "device": str(place), "original": original,
             "num_classes": num_classes, "lego_version": lego.__version__}  # fmt: skip
    epochs: list[Epoch] = []
    with join_process_group(processes, place), _Shown(recipe, processes, as_json) as shown:
        events = _events(target) if tensorboard and processes.first else None

        def on_epoch(epoch: Epoch) -> None:
            epochs.append(epoch)
            shown.epoch(epoch)
            if events is not None:
                events(epoch)

        finetune_(
            network.to(place),
            recipe,
            train,
            validation,
            teacher,
            target,
            resume or has_restarted(),
            force,
            noted,
            processes,
            workers,
            shown.step,
            on_epoch,
        )
    if processes.first:
        _tell(target, epochs, as_json)


def _device(name: str | None, processes: Processes) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and processes.size > 1:
        name = f"cuda:{processes.local_rank}"
        torch.cuda.set_device(processes.local_rank)
    return read_device(name)


class _Shown:
    """The live bar of this epoch, and a line an epoch; silent on all processes but the first."""

    def __init__(self, recipe: Recipe, processes: Processes, as_json: bool):
        console = Console(stderr=True)
        quiet = as_json or not processes.first
        self.lines = not quiet
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )
        self.recipe = recipe
        self.task = self.bar.add_task("epoch 1", total=None, told="")

    def __enter__(self) -> _Shown:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def step(self, step: Step) -> None:
        top1 = "" if step.top1 is None else f" top-1 {step.top1:.1f} %"
        self.bar.update(
            self.task,
            description=f"epoch {step.epoch}/{step.epochs}",
            total=step.updates,
            completed=step.update,
            told=f"loss {step.loss:.3f}{top1} {step.images_per_second:.0f} images/s "
            f"{step.changed} indices changed",
        )

    def epoch(self, epoch: Epoch) -> None:
        if not self.lines:
            return
        p = epoch.progress
        values = (("top-1", epoch.top1), ("top-5", epoch.top5), ("agreement", epoch.agreement))
        told = "  ".join(f"{name} {value:.2f} %" for name, value in values if value is not None)
        mark = "  best" if epoch.best else ""
        self.bar.console.print(
            f"epoch {p.epoch}/{p.epochs}  loss {p.loss:.4f}  {told}  "
            f"{p.changed} indices changed  {p.images_per_second:.0f} images/s{mark}",
            highlight=False,
            soft_wrap=True,
        )


def _events(target: Path) -> Callable[[Epoch], None]:
    """What writes an epoch for TensorBoard."""
    try:
        importlib.import_module("tensorboard")
        library = importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise UsageError(
            "--tensorboard needs a package: pip install 'legocompress[tensorboard]'"
        ) from error

    @lru_cache
    def writer() -> Any:  # once the run has its folder
        return library.SummaryWriter(str(target / "tensorboard"))

    def write(epoch: Epoch) -> None:
        p = epoch.progress
        values = {"train/loss": p.loss, "train/top1": p.top1, "train/lr": p.lr,
                  "train/index_changes": p.changed, "eval/top1": epoch.top1,
                  "eval/top5": epoch.top5, "eval/agreement": epoch.agreement}  # fmt: skip
        for name, value in values.items():
            if value is not None:
                writer().add_scalar(name, value, p.epoch)
        writer().flush()

    return write


def _tell(target: Path, epochs: list[Epoch], as_json: bool) -> None:
    if as_json:
        render.print_json({"out": str(target), "epochs": [asdict(epoch) for epoch in epochs]})
        return
    if not epochs:
        click.echo(f"{target} is done already; nothing was left to train.")
    click.echo(f"best epoch: {target / 'best'}, last epoch: {target / 'last'}")
    click.echo(f"\nNext: legocompress report {target / 'best'}")


@click.command()
@click.argument("name", required=False)
@json_option
def recipes(name: str | None, as_json: bool) -> None:
    """List the shipped recipes, or show all that NAME (shipped, or a .yaml file) says."""
    if name is None:
        found = {each: load_recipe(each) for each in list_shipped_recipes()}
        if as_json:
            render.print_json({each: r.model_dump(mode="json") for each, r in found.items()})
            return
        rows = [[each, str(r.epochs), r.description] for each, r in found.items()]
        render.table(["recipe", "epochs", "note"], rows)
        return
    render.print_recipe(load_recipe(name), as_json)
