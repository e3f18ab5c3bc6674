"""The training loop: updates, stages, the moving average, and all the state that a resume needs."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3, dispatch_clip_grad, distribute_bn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from legocompress.conv import freeze_, freeze_indices_, lego_modules, train_indices_
from legocompress.convert import round_
from legocompress.data import Images
from legocompress.errors import UsageError
from legocompress.finetune.distill import Criterion, check_labels
from legocompress.finetune.distributed import Processes
from legocompress.finetune.failures import check_finite, diverged, explained
from legocompress.finetune.optimize import (
    add_anchor_,
    add_balance_,
    clipped_parameters,
    forget_proxies_,
    make_optimizer,
    make_schedule,
    set_rates_,
)
from legocompress.finetune.recipe import Recipe
from legocompress.finetune.safe_convolutions import SafeConvolutions
from legocompress.finetune.seeding import seed_all, seed_of
from legocompress.finetune.training_data import TrainingLoader
from legocompress.probe import evaluating

CHECK_EVERY = 10  # updates between looks at the loss, which make a GPU wait
AMP_DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Progress:
    """Where training stands; loss and top-1 are means over the epoch so far.

    `changed` counts the entries of all indices that differ from the epoch's start. `top1` is on
    images as they were before mixing, None where the labels are not read.
    """

    epoch: int
    epochs: int
    update: int
    updates: int
    loss: float
    top1: float | None
    images_per_second: float
    changed: int
    lr: float


class Trainer:
    """One run of a recipe on one network, in place; `state` and `restore` are exact inverses.

    Args:
        model: the network, Lego or dense, on `device`.
        recipe: what to do.
        train: PIL images and labels.
        original: the network that teaches, on `device`.
        device: where to compute.
        processes: this process among its like.
        workers: processes that read images.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        train: Images,
        original: nn.Module | None,
        device: torch.device,
        processes: Processes,
        workers: int = 0,
    ):
        self.recipe, self.device, self.processes = recipe, device, processes
        cuda = device.type == "cuda"
        self.loader = TrainingLoader(
            train, model, recipe, processes.rank, processes.size, workers, cuda
        )
        self.layout = torch.channels_last if recipe.channels_last else torch.preserve_format
        self.model = _synchronised(model, recipe, processes, device)
        for network in (self.model, original):
            if network is not None and recipe.channels_last:
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.original = None if original is None else original.eval()
        self.criterion = Criterion(recipe, self.model, self.original)
        self.epoch = self.update = 0
        self._indices_train = recipe.stages[0].indices == "trained"
        if self._indices_train:
            train_indices_(self.model)
        self.optimizer = make_optimizer(self.model, recipe.optimizer)
        self.schedule = make_schedule(self.optimizer, recipe, self.loader.updates)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "fp16")
        self.ema = (
            None
            if recipe.ema is None
            else ModelEmaV3(self.model, decay=recipe.ema.decay, use_warmup=recipe.ema.warmup)
        )
        self.n_outputs: int | None = None
        self.mixup: Mixup | None = None
        self._begin_epoch()
        self._enter_stage()

    @property
    def learning_rate(self) -> float:
        """The rate that multiples of 1 learn at now."""
        group = self.optimizer.param_groups[0]
        return float(group["lr"]) / (group["lr_scale"] or 1)

    def _begin_epoch(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)  # loss, right labels, images
        self.before = {name: m.index.clone() for name, m in lego_modules(self.model)}

    def _enter_stage(self) -> None:
        """Make the parameters of the epoch's stage learn, and let go of N once indices freeze."""
        stage = self.recipe.stage_of(self.epoch)
        if self._indices_train and stage.indices == "frozen":
            self._indices_train = False
            freeze_indices_(self.model)
            forget_proxies_(self.optimizer)
            if self.ema is not None:
                freeze_indices_(self.ema.module)
        set_rates_(self.model, self.optimizer, stage.rates)
        if not any(p.requires_grad for p in self.model.parameters()):
            raise UsageError(f"nothing trains in epoch {self.epoch + 1}: its rates are all 0")
        self.runs = self.model
        if self.processes.size > 1:
            ids = [self.processes.local_rank] if self.device.type == "cuda" else None
            self.runs = DistributedDataParallel(self.model, ids, broadcast_buffers=False)

    def train_epoch(
        self,
        on_step: Callable[[Progress], None] | None = None,
        save: Callable[[], None] | None = None,
    ) -> Progress:
        """Train to the end of the current epoch.

        Args:
            on_step: called every few updates and at the end.
            save: called every `save_every` updates within the epoch.

        Raises:
            TrainingError: the loss is no finite number, memory is out, or a reader has died.
            DataError: an image cannot be read, or a label is no output.
        """
        self.model.train()
        if self.recipe.norm_stats == "frozen":
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        every, first, started = self.recipe.save_every, self.update, time.perf_counter()
        with contextlib.closing(self.loader.parts(self.epoch, self.update)) as parts:
            while self.update < self.loader.updates:
                with explained(self.recipe, self.epoch):
                    self._update(parts)
                self.update += 1
                last = self.update == self.loader.updates
                saves = save is not None and every > 0 and self.update % every == 0 and not last
                if last or saves or self.update % CHECK_EVERY == 0:
                    rate = (self.update - first) / (time.perf_counter() - started)
                    progress = self._progress(rate)
                    if on_step is not None:
                        on_step(progress)
                if save is not None and saves:
                    self._finish_norms()
                    save()
        self._finish_norms()
        return progress

    def next_epoch(self) -> None:
        """Go on to the next epoch, once this one is evaluated."""
        self.epoch, self.update = self.epoch + 1, 0
        if self.recipe.stage_of(self.epoch) != self.recipe.stage_of(self.epoch - 1):
            self._enter_stage()
        self._begin_epoch()

    def _update(self, parts: Iterator[tuple[Tensor, Tensor]]) -> None:
        done = self.epoch * self.loader.updates + self.update
        self.schedule.step_update(done)
        for number in range(self.recipe.accumulate):
            images, labels = next(parts)
            place = (self.recipe.seed, "update", done, number, self.processes.rank)
            seed_all(*place)
            if self.device.type == "cuda":
                torch.cuda.manual_seed(seed_of(*place))
            last = number + 1 == self.recipe.accumulate
            alone = last or self.runs is self.model
            with (
                contextlib.nullcontext() if alone else _unsynchronised(self.runs),
                SafeConvolutions() if self.device.type == "cpu" else contextlib.nullcontext(),
            ):
                self._backward(images, labels)
        if self.recipe.anchor or self.recipe.balance or self.recipe.clip:
            self.scaler.unscale_(self.optimizer)
        if self.recipe.anchor:
            add_anchor_(self.model, self.recipe.anchor)
        if self.recipe.balance:
            add_balance_(self.model, self.recipe.balance)
        if self.recipe.clip is not None:
            clip = self.recipe.clip
            dispatch_clip_grad(clipped_parameters(self.model), clip.value, clip.mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model, step=done + 1)

    def _backward(self, images: Tensor, labels: Tensor) -> None:
        x = images.to(self.device, memory_format=self.layout, non_blocking=True)
        y = labels.to(self.device, non_blocking=True)
        targets = self._targets(x, y)
        dtype = AMP_DTYPES[self.recipe.amp]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            if self.mixup is not None:
                x, targets = self.mixup(x, targets)
            loss, logits = self.criterion(self.runs, self.model, x, targets)
        torch.autograd.backward(self.scaler.scale(loss / self.recipe.accumulate))
        right = (logits.argmax(1) == y).sum()
        counts = [
            loss.detach().double() * len(y),
            right.double(),
            right.new_tensor(len(y)).double(),
        ]
        self.sums = self.sums.to(self.device) + torch.stack(counts)

    def _targets(self, x: Tensor, labels: Tensor) -> Tensor:
        """The labels, checked; zeros where they are not read. Sets up mixing once."""
        if self.n_outputs is None:
            with evaluating(self.model):
                logits = self.model(x[:1])
            check_labels(logits, labels, False)
            self.n_outputs = int(logits.shape[1])
            if self.recipe.mixup is not None:
                m = self.recipe.mixup
                self.mixup = Mixup(
                    m.mixup, m.cutmix, prob=m.prob, switch_prob=m.switch_prob,
                    label_smoothing=self.recipe.label_smoothing, num_classes=self.n_outputs,
                )  # fmt: skip
        if not self.recipe.uses_labels:
            return torch.zeros_like(labels)
        check_labels(x.new_empty(0, self.n_outputs), labels, True)
        return labels

    def _progress(self, updates_per_second: float) -> Progress:
        loss, right, images = self.processes.sum(*self.sums.tolist())
        if not math.isfinite(loss):
            raise diverged(f"the loss is {loss / images}", self.recipe, self.epoch)
        return Progress(
            epoch=self.epoch + 1,
            epochs=self.recipe.epochs,
            update=self.update,
            updates=self.loader.updates,
            loss=loss / images,
            top1=100 * right / images if self.recipe.uses_labels else None,
            images_per_second=updates_per_second * self.recipe.batch_size,
            changed=self.changed(),
            lr=self.learning_rate,
        )

    def changed(self) -> int:
        """Entries of all indices that differ from the epoch's start."""
        total = 0
        for name, module in lego_modules(self.model):
            module.settle()
            total += int((module.index != self.before[name].to(module.index.device)).sum())
        return total

    def _finish_norms(self) -> None:
        """Average the running statistics of norms over the processes."""
        if self.processes.size > 1:
            distribute_bn(self.model, self.processes.size, reduce=True)
            if self.ema is not None:
                distribute_bn(self.ema.module, self.processes.size, reduce=True)

    def snapshot(self) -> nn.Module:
        """The network as it is stored: averaged if asked for, rounded, without N, in eval mode.

        Raises:
            TrainingError: a weight is no finite number.
        """
        model: nn.Module = copy.deepcopy(self.model if self.ema is None else self.ema.module)
        round_(freeze_indices_(model))
        check_finite(model, self.recipe, self.epoch)
        return freeze_(model.eval())

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, as plain tensors and values.

        Raises:
            TrainingError: a weight is no finite number.
        """
        check_finite(self.model, self.recipe, self.epoch)
        for _, module in lego_modules(self.model):
            module.settle()
        return {
            "epoch": self.epoch,
            "update": self.update,
            "updates": self.loader.updates,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "sums": self.sums,
            "before": self.before,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            UsageError: it is of other data.
        """
        if state["updates"] != self.loader.updates:
            raise UsageError(
                f"the run that --resume finds had {state['updates']} updates an epoch and this one "
                f"has {self.loader.updates}: the data has changed; start afresh with --force"
            )
        self.epoch, self.update = state["epoch"], state["update"]
        self._enter_stage()
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.sums, self.before = state["sums"], state["before"]


def _synchronised(
    model: nn.Module, recipe: Recipe, processes: Processes, device: torch.device
) -> nn.Module:
    if recipe.norm_stats != "sync" or processes.size == 1:
        return model
    if device.type != "cuda":
        raise UsageError("norm_stats: sync works on GPUs only; use 'batch' or 'frozen'")
    return convert_sync_batchnorm(model)  # type: ignore[no-any-return]


def _unsynchronised(runs: Any) -> contextlib.AbstractContextManager[None]:
    return runs.no_sync()  # type: ignore[no-any-return]
