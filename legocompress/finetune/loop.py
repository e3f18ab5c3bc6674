"""Fine-tuning: train by a recipe, evaluate what would be stored, keep the best, resume exactly."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from legocompress.data.images import Images
from legocompress.errors import UsageError
from legocompress.finetune.distributed import Processes
from legocompress.finetune.epoch import Epoch, EpochEvaluator
from legocompress.finetune.progress import Progress
from legocompress.finetune.recipe import Recipe
from legocompress.finetune.run_folder import BEST, LAST, RunFolder
from legocompress.finetune.seeding import preserve_random_state
from legocompress.finetune.targets import count_outputs
from legocompress.finetune.trainer import Trainer
from legocompress.lego.module import ModelT
from legocompress.lego.surgery import freeze_indices_
from legocompress.models.checks import check_network, refuse_quantized
from legocompress.state.conversion import ConversionRecord
from legocompress.state.model_state import lego_state


def finetune_(
    model: ModelT,
    recipe: Recipe,
    train: Images,
    validation: Images,
    original: nn.Module | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    args: dict[str, Any] | None = None,
    processes: Processes | None = None,
    workers: int = 0,
    on_step: Callable[[Progress], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> ModelT:
    """Train a network by a recipe, in place, and return it as its last epoch is stored.

    Where the recipe says so, indices learn through a proxy N by the straight-through estimator.
    After every epoch, a copy of the network is rounded to its storage dtypes and evaluated. That
    same copy is written to `out/last`, and to `out/best` if it is the best so far.

    Args:
        model: the network, on the device to train on; dense ones train too, without `out`.
        recipe: what to do.
        train: PIL images and labels, as `open_training` gives them.
        validation: images as the network takes them, and labels.
        original: the network that teaches, if the recipe distils.
        out: folder for args.yaml, summary.csv, best/, last/ and the state to resume from.
        resume: continue the run in `out`, or start it if nothing was saved yet.
        force: replace a run in `out`.
        args: what to write to args.yaml beside the recipe.
        processes: this process among those that train together, which have joined a group already.
        workers: number of processes that read images.
        on_step: called every few updates.
        on_epoch: called after every epoch.

    Raises:
        TrainingError: the loss is NaN or infinite, memory is exhausted, or a process died.
        DataError: an image cannot be read, or a label is not among the network's outputs.
        UsageError: a network is wrapped, compiled or scripted, or holds a lazy layer; or the recipe
            does not fit network, data, processes or the run to resume.
        OutputExistsError: `out` exists.
        OutputError: `out` cannot be written.
    """
    check_network(model)
    refuse_quantized(model, "finetune_")
    if original is not None:
        check_network(original)
    processes = processes or Processes()
    device = next(model.parameters()).device
    _check_outputs(model, original if recipe.distill is not None else None, validation, device)
    requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    folder, saved = _open_run(recipe, out, resume, force, args, processes)
    _record_recipe(model, recipe)
    with preserve_random_state():
        trainer = Trainer(model, recipe, train, original, device, processes, workers)
        evaluator = EpochEvaluator(
            validation,
            None if recipe.distill is None else original,
            trainer.loader.part,
            trainer.loader.workers,
            processes,
        )
        run = _Run(trainer, evaluator, folder if processes.first else None)
        if saved is not None:
            run.restore(saved)
        while trainer.state.epoch < recipe.epochs:
            epoch = run.train_epoch(on_step)
            if on_epoch is not None:
                on_epoch(epoch)
        final = trainer.state.take_snapshot()
        if saved is not None:
            run.write_results(final)
    processes.wait()
    freeze_indices_(model).load_state_dict(final.state_dict())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(requires_grad[name])
    return model.eval()


class _Run:
    """Trains and evaluates epoch by epoch, and writes the results to a folder.

    `folder` is None in processes that do not write.
    """

    def __init__(self, trainer: Trainer, evaluator: EpochEvaluator, folder: RunFolder | None):
        self.trainer, self.evaluator, self.folder = trainer, evaluator, folder
        self.rows: list[dict[str, Any]] = []  # of summary.csv
        self.best_score = -math.inf

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from a state that `_save_state` saved."""
        self.trainer.state.restore(saved["trainer"])
        self.rows, self.best_score = saved["rows"], saved["best"]

    def train_epoch(self, on_step: Callable[[Progress], None] | None) -> Epoch:
        """Train one epoch, evaluate it, and write what it gave."""
        progress = self.trainer.train_epoch(on_step, self._save_state)
        stored = self.trainer.state.take_snapshot()
        epoch = self.evaluator.evaluate(stored, progress, self.best_score)
        self.best_score = max(self.best_score, epoch.score)
        self.rows.append(_make_summary_row(epoch))
        self.trainer.state.start_next_epoch()
        if self.folder is not None and epoch.best:
            self.folder.save_model(stored, BEST)
        self.write_results(stored, with_state=True)
        return epoch

    def write_results(self, stored: nn.Module, with_state: bool = False) -> None:
        """Write the last network, the state if asked for, and the summary, in this order."""
        if self.folder is not None:
            self.folder.save_model(stored, LAST)
            if with_state:
                self._save_state()
            self.folder.write_summary(self.rows)

    def _save_state(self) -> None:
        if self.folder is not None:
            self.folder.save_state(
                {
                    "recipe": self.trainer.recipe.model_dump(mode="json"),
                    "rows": self.rows,
                    "best": self.best_score,
                    "trainer": self.trainer.state.to_dict(),
                }
            )


def _check_outputs(
    model: nn.Module, original: nn.Module | None, validation: Images, device: torch.device
) -> None:
    """Raise DataError, before anything is changed, if a network has no logits (N, classes)."""
    with preserve_random_state():
        images = next((images for images, _ in validation.batches(1, 0)), None)
        for network in (model, original):
            if network is not None and images is not None:
                with contextlib.suppress(RuntimeError):  # the first update explains it
                    count_outputs(network, images.to(device))


def _open_run(
    recipe: Recipe,
    out: str | Path | None,
    resume: bool,
    force: bool,
    args: dict[str, Any] | None,
    processes: Processes,
) -> tuple[RunFolder | None, dict[str, Any] | None]:
    """Open the run's folder, and load the state to continue from if there is one."""
    if out is None:
        return None, None
    folder = RunFolder(Path(out))
    if processes.first:
        folder.remove_unfinished_files()
    saved = folder.load_state() if resume else None
    if saved is not None:
        _check_same_recipe(saved["recipe"], recipe.model_dump(mode="json"))
        return folder, saved
    processes.wait()  # every process has looked before the first one writes
    if processes.first:
        folder.start_run(
            {**(args or {}), "recipe": recipe.model_dump(mode="json")}, force or resume
        )
    return folder, None


def _check_same_recipe(before: dict[str, Any], now: dict[str, Any]) -> None:
    keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if keys:
        changes = ", ".join(f"{key}: {before.get(key)} then, {now.get(key)} now" for key in keys)
        raise UsageError(
            f"the run that --resume finds was started with another recipe ({changes}); give the "
            "same one, or start afresh with --force"
        )


def _record_recipe(model: nn.Module, recipe: Recipe) -> None:
    """Write the recipe into the network's conversion record, which its checkpoints will hold."""
    record = lego_state(model).conversion
    if isinstance(record, ConversionRecord):
        converted: Any = model
        lego_state(converted).conversion = replace(record, recipe=recipe.model_dump(mode="json"))


def _make_summary_row(epoch: Epoch) -> dict[str, Any]:
    """One line of summary.csv, whose epochs count from 0."""
    progress = epoch.progress
    return {
        "epoch": progress.epoch - 1,
        "train": {
            "loss": progress.loss,
            "top1": progress.top1,
            "index_changes": progress.changed,
        },
        "eval": {"top1": epoch.top1, "top5": epoch.top5, "agreement": epoch.agreement},
        "lr": progress.lr,
    }
