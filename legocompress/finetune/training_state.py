"""The state of a run, which changes with stages and is saved and restored."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from legocompress.errors import UsageError
from legocompress.finetune.distributed import Processes
from legocompress.finetune.failures import check_finite
from legocompress.finetune.norms import average_norm_statistics_
from legocompress.finetune.optimize import (
    drop_proxies_,
    make_optimizer,
    make_schedule,
    set_rates_,
)
from legocompress.finetune.progress import EpochMeter
from legocompress.finetune.recipe import Recipe
from legocompress.lego.module import lego_modules
from legocompress.lego.storage import round_
from legocompress.lego.surgery import freeze_, freeze_indices_, train_indices_


class TrainingState:
    """A network in training, and everything that its next updates depend on.

    `to_dict` and `restore` are exact inverses: a restored run continues with the same numbers.

    Args:
        model: the network, Lego or dense, on `device`; it trains in place.
        recipe: what to do.
        updates: number of updates per epoch.
        device: where to compute.
        processes: this process among those that train together.

    Attributes:
        runs: the module to call: `model`, or its wrapper for several processes.
        ema: the moving average of the network, if the recipe asks for one.
        epoch: the current epoch, from 0.
        update: number of updates done in this epoch.
        meter: sums over this epoch.

    Raises:
        UsageError: the optimiser does not exist, or nothing trains.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        updates: int,
        device: torch.device,
        processes: Processes,
    ):
        self.model, self.recipe, self.updates = model, recipe, updates
        self.device, self.processes = device, processes
        self.epoch = self.update = 0
        self._trains_indices = recipe.stages[0].indices == "trained"
        if self._trains_indices:
            train_indices_(model)
        self.optimizer = make_optimizer(model, recipe.optimizer)
        self.schedule = make_schedule(self.optimizer, recipe, updates)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "fp16")
        self.ema = (
            None
            if recipe.ema is None
            else ModelEmaV3(model, decay=recipe.ema.decay, use_warmup=recipe.ema.warmup)
        )
        self.meter = EpochMeter(model)
        self._enter_stage()

    @property
    def updates_done(self) -> int:
        """Number of updates done in all epochs."""
        return self.epoch * self.updates + self.update

    @property
    def learning_rate(self) -> float:
        """The current learning rate of a kind of parameter whose multiple is 1."""
        group = self.optimizer.param_groups[0]
        return float(group["lr"]) / (group["lr_scale"] or 1)

    def _enter_stage(self) -> None:
        """Set the rates of the epoch's stage, and remove N when its indices freeze."""
        stage = self.recipe.stage_of(self.epoch)
        if self._trains_indices and stage.indices == "frozen":
            self._trains_indices = False
            freeze_indices_(self.model)
            drop_proxies_(self.optimizer)
            if self.ema is not None:
                freeze_indices_(self.ema.module)
        set_rates_(self.model, self.optimizer, stage.rates)
        if not any(p.requires_grad for p in self.model.parameters()):
            raise UsageError(f"nothing trains in epoch {self.epoch + 1}: its rates are all 0")
        self.runs = self.model
        if self.processes.size > 1:
            ids = [self.processes.local_rank] if self.device.type == "cuda" else None
            self.runs = DistributedDataParallel(self.model, ids, broadcast_buffers=False)

    def start_next_epoch(self) -> None:
        """Move to the start of the next epoch, and into its stage if that is a new one."""
        self.epoch, self.update = self.epoch + 1, 0
        if self.recipe.stage_of(self.epoch) != self.recipe.stage_of(self.epoch - 1):
            self._enter_stage()
        self.meter = EpochMeter(self.model)

    def average_norm_statistics(self) -> None:
        """Average the running statistics of norms over the processes."""
        average_norm_statistics_(self.model, self.processes)
        if self.ema is not None:
            average_norm_statistics_(self.ema.module, self.processes)

    def take_snapshot(self) -> nn.Module:
        """Copy the network as it is stored: the average if there is one, rounded, without N.

        The copy is frozen and in eval mode.

        Raises:
            TrainingError: a weight is NaN or infinite.
        """
        model: nn.Module = copy.deepcopy(self.model if self.ema is None else self.ema.module)
        round_(freeze_indices_(model))
        check_finite(model, self.recipe, self.epoch)
        return freeze_(model.eval())

    def collect_sums(self) -> None:
        """Give the epoch's sums of all processes to the first one, which saves the state."""
        if self.processes.size > 1:
            total = self.processes.sum(*self.meter.sums.tolist())
            self._set_sums(torch.tensor(total, dtype=torch.float64))

    def _set_sums(self, total: torch.Tensor) -> None:
        self.meter.sums = total if self.processes.first else torch.zeros_like(total)

    def to_dict(self) -> dict[str, Any]:
        """Collect the state as tensors and plain values.

        Raises:
            TrainingError: a weight is NaN or infinite.
        """
        check_finite(self.model, self.recipe, self.epoch)
        for _, module in lego_modules(self.model):
            module.synchronise_index()
        return {
            "epoch": self.epoch,
            "update": self.update,
            "updates": self.updates,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "sums": self.meter.sums,
            "before": self.meter.start_indices,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from a state that `to_dict` collected.

        Raises:
            UsageError: it was saved with other data.
        """
        if saved["updates"] != self.updates:
            raise UsageError(
                f"the run that --resume finds had {saved['updates']} updates per epoch and this "
                f"one has {self.updates}: the data has changed; start afresh with --force"
            )
        self.epoch, self.update = saved["epoch"], saved["update"]
        self._enter_stage()
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(saved["ema"])
        self._set_sums(saved["sums"])
        self.meter.start_indices = saved["before"]
