"""Fine-tuning: train by a recipe, evaluate what would be stored, keep the best, resume exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import IterableDataset, Subset

from legocompress.data.evaluation import evaluate
from legocompress.data.images import Images
from legocompress.errors import UsageError
from legocompress.finetune.distributed import Processes
from legocompress.finetune.recipe import Recipe
from legocompress.finetune.run_folder import BEST, LAST, RunFolder
from legocompress.finetune.seeding import randomness_kept
from legocompress.finetune.trainer import Progress, Trainer
from legocompress.lego.module import ModelT
from legocompress.lego.surgery import freeze_indices_
from legocompress.models.factory import create
from legocompress.models.source import source_of
from legocompress.state.conversion import ConversionRecord
from legocompress.state.model_state import lego_state


@dataclass(frozen=True)
class Epoch:
    """What an epoch gave, of the network as it is stored; `best` where no epoch before did better.

    Accuracies and agreement with the original are percentages, None where they cannot be had.
    """

    progress: Progress
    top1: float | None
    top5: float | None
    agreement: float | None
    best: bool

    @property
    def score(self) -> float:
        """What the best epoch is chosen by: top-1, or agreement where there are no labels."""
        value = self.agreement if self.top1 is None else self.top1
        return -math.inf if value is None else value


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

    Indices learn through a proxy N by the straight-through estimator where the recipe says so.
    After every epoch the network is rounded to its storage dtypes (a copy of it), evaluated, and
    that very copy is written to `out/last`, and to `out/best` if it is the best so far.

    Args:
        model: the network, on the device to train on; dense ones train too, without `out`.
        recipe: what to do.
        train: PIL images and labels, as `open_training` gives them.
        validation: images as the network takes them, and labels.
        original: the network that teaches, if the recipe distils.
        out: folder for args.yaml, summary.csv, best/, last/ and the state to resume from.
        resume: go on with the run in `out`, or start it if nothing was saved yet.
        force: replace a run in `out`.
        args: what to note in args.yaml beside the recipe.
        processes: this process among those that train together, joined already.
        workers: processes that read images.
        on_step: called every few updates.
        on_epoch: called after every epoch.

    Raises:
        TrainingError: the loss is no finite number, memory is out, or a reader has died.
        DataError: an image cannot be read, or a label is no output of the network.
        UsageError: the recipe does not fit network, data, processes or the run to resume.
        OutputExistsError: `out` exists.
        OutputError: `out` cannot be written.
    """
    processes = processes or Processes()
    device = next(model.parameters()).device
    learning = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    folder, state = _open_run(recipe, out, resume, force, args, processes)
    _note_recipe(model, recipe)
    with randomness_kept():
        trainer = Trainer(model, recipe, train, original, device, processes, workers)
        rows: list[dict[str, Any]] = []
        best = -math.inf
        if state is not None:
            trainer.restore(state["trainer"])
            rows, best = state["rows"], state["best"]

        def save_state() -> None:
            if folder is not None and processes.first:
                kept = {"recipe": recipe.model_dump(mode="json"), "rows": rows, "best": best}
                folder.save_state({**kept, "trainer": trainer.state()})

        while trainer.epoch < recipe.epochs:
            progress = trainer.train_epoch(on_step, save_state)
            stored = trainer.snapshot()
            epoch = _evaluate(stored, validation, original, progress, best, trainer, processes)
            best = max(best, epoch.score)
            rows.append(_row(epoch))
            trainer.next_epoch()
            if folder is not None and processes.first:
                if epoch.best:
                    folder.save_model(stored, BEST)
                folder.save_model(stored, LAST)
                save_state()
                folder.write_summary(rows)
            if on_epoch is not None:
                on_epoch(epoch)
        final = trainer.snapshot()
        if folder is not None and processes.first and state is not None:
            folder.save_model(final, LAST)
            folder.write_summary(rows)
    processes.wait()
    freeze_indices_(model).load_state_dict(final.state_dict())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learning[name])
    return model.eval()


def _open_run(
    recipe: Recipe,
    out: str | Path | None,
    resume: bool,
    force: bool,
    args: dict[str, Any] | None,
    processes: Processes,
) -> tuple[RunFolder | None, dict[str, Any] | None]:
    """The run's folder, and the state to go on from."""
    if out is None:
        return None, None
    folder = RunFolder(Path(out))
    if processes.first:
        folder.tidy()
    state = folder.load_state() if resume else None
    if state is not None:
        _check_same(state["recipe"], recipe.model_dump(mode="json"))
        return folder, state
    processes.wait()  # every process has looked before the first one writes
    if processes.first:
        noted = {**(args or {}), "recipe": recipe.model_dump(mode="json")}
        folder.begin(noted, force or resume)
    return folder, None


def _check_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    differing = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if differing:
        told = ", ".join(f"{key}: {before.get(key)} then, {now.get(key)} now" for key in differing)
        raise UsageError(
            f"the run that --resume finds was started with another recipe ({told}); give the same "
            "one, or start afresh with --force"
        )


def _note_recipe(model: nn.Module, recipe: Recipe) -> None:
    record = lego_state(model).conversion
    if isinstance(record, ConversionRecord):
        lego_state(model).conversion = replace(record, recipe=recipe.model_dump(mode="json"))


def _evaluate(
    stored: nn.Module,
    validation: Images,
    original: nn.Module | None,
    progress: Progress,
    best: float,
    trainer: Trainer,
    processes: Processes,
) -> Epoch:
    """Evaluate every process's share, and put the shares together."""
    share = validation
    if processes.size > 1 and validation.size >= processes.size:
        dataset: Any = validation.dataset
        if not isinstance(dataset, IterableDataset):  # a stream cuts itself
            positions = range(processes.rank, validation.size, processes.size)
            share = replace(validation, dataset=Subset(dataset, positions), size=len(positions))
    teacher = original if trainer.criterion.distill is not None else None
    found = evaluate(
        stored, share.batches(trainer.loader.part, trainer.loader.workers), teacher, share.n_classes
    )
    values = [found.top1, found.top5, found.agreement]
    *sums, images = processes.sum(*((v or 0.0) * found.images for v in values), found.images)
    top1, top5, agreement = (
        None if value is None else total / images for value, total in zip(values, sums, strict=True)
    )
    epoch = Epoch(progress, top1, top5, agreement, False)
    if epoch.score == -math.inf:
        raise UsageError(
            "the validation images have no labels and no network is distilled, so there is nothing "
            "to tell a good epoch by"
        )
    return replace(epoch, best=epoch.score > best)


def _row(epoch: Epoch) -> dict[str, Any]:
    """One line of summary.csv."""
    p = epoch.progress
    train = {"loss": p.loss, "top1": p.top1, "index_changes": p.changed}
    evaluated = {"top1": epoch.top1, "top5": epoch.top5, "agreement": epoch.agreement}
    return {"epoch": p.epoch - 1, "train": train, "eval": evaluated, "lr": p.lr}


def noted_original(model: nn.Module) -> nn.Module:
    """The network that a converted one was made of, by the name that the checkpoint notes.

    Raises:
        UsageError: its weights came from a file, or from nowhere.
        LegoError: as `create` raises.
    """
    source = source_of(model)
    if (
        source.library is None
        or source.weights in ("unknown",)
        or source.weights.startswith(("file ", "random"))
    ):
        raise UsageError(
            "the recipe distils the original network, and the checkpoint does not tell where it "
            f"is (its weights are: {source.weights}); name it with --original or "
            "--original-weights, or train on labels alone with --set distill=null"
        )
    return create(source.weights, model_args=source.model_args)
