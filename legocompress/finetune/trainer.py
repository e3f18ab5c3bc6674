"""The training loop: the updates of an epoch, from loading images to the optimiser's step."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

from legocompress.data.images import Images
from legocompress.finetune.distill import Criterion
from legocompress.finetune.distributed import Processes
from legocompress.finetune.failures import explain_failures, make_divergence_error
from legocompress.finetune.norms import set_training_mode_, synchronise_norms_
from legocompress.finetune.optimize import add_anchor_, add_balance_, select_clipped_parameters
from legocompress.finetune.progress import Progress
from legocompress.finetune.recipe import Recipe
from legocompress.finetune.safe_convolutions import SafeConvolutions
from legocompress.finetune.seeding import derive_seed, seed_all
from legocompress.finetune.targets import Targets
from legocompress.finetune.training_loader import TrainingLoader
from legocompress.finetune.training_state import TrainingState

PROGRESS_EVERY = 10  # updates between looks at the loss, which make a GPU wait
AMP_DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """Trains one network by a recipe, in place, epoch by epoch; what changes is in `state`.

    Args:
        model: the network, Lego or dense, on `device`.
        recipe: what to do.
        train: PIL images and labels.
        original: the network that teaches, on `device`.
        device: where to compute.
        processes: this process among those that train together.
        workers: number of processes that read images.
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
        pin_memory = device.type == "cuda"
        self.loader = TrainingLoader(
            train, model, recipe, processes.rank, processes.size, workers, pin_memory
        )
        self.layout = torch.channels_last if recipe.channels_last else torch.preserve_format
        self.model = synchronise_norms_(model, recipe, processes, device)
        for network in (self.model, original):
            if network is not None and recipe.channels_last:
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        teacher = None if original is None else original.eval()
        self.criterion = Criterion(recipe, self.model, teacher)
        self.targets = Targets(recipe)
        self.state = TrainingState(self.model, recipe, self.loader.updates, device, processes)

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
            TrainingError: the loss is NaN or infinite, memory is exhausted, or a process died.
            DataError: an image cannot be read, or a label is not among the outputs.
        """
        state, every = self.state, self.recipe.save_every
        set_training_mode_(self.model, self.recipe)
        first, started = state.update, time.perf_counter()
        with contextlib.closing(self.loader.parts(state.epoch, first)) as parts:
            while state.update < self.loader.updates:
                with explain_failures(self.recipe, state.epoch):
                    self._update(parts)
                state.update += 1
                last = state.update == self.loader.updates
                saves = save is not None and every > 0 and state.update % every == 0 and not last
                if last or saves or state.update % PROGRESS_EVERY == 0:
                    updates_per_second = (state.update - first) / (time.perf_counter() - started)
                    progress = self._measure_progress(updates_per_second)
                    if on_step is not None:
                        on_step(progress)
                if save is not None and saves:
                    state.average_norm_statistics()
                    state.collect_sums()
                    save()
        state.average_norm_statistics()
        return progress

    def _update(self, parts: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Do one update: accumulate the gradients of its parts, then step the optimiser."""
        done = self.state.updates_done
        self.state.schedule.step_update(done)
        for number in range(self.recipe.accumulate):
            images, labels = next(parts)
            place = (self.recipe.seed, "update", done, number, self.processes.rank)
            seed_all(*place)
            if self.device.type == "cuda":
                torch.cuda.manual_seed(derive_seed(*place))
            last = number + 1 == self.recipe.accumulate
            skips_sync = not last and self.state.runs is not self.model
            with (
                _skip_gradient_sync(self.state.runs) if skips_sync else contextlib.nullcontext(),
                SafeConvolutions() if self.device.type == "cpu" else contextlib.nullcontext(),
            ):
                self._backward(images, labels)
        self._step_optimizer()
        if self.state.ema is not None:
            self.state.ema.update(self.model, step=done + 1)

    def _backward(self, images: Tensor, labels: Tensor) -> None:
        """Add the gradients of one part: images (N, c, H, W) and labels (N,)."""
        x = images.to(self.device, memory_format=self.layout, non_blocking=True)
        y = labels.to(self.device, non_blocking=True)
        targets = self.targets.check(self.model, x, y)
        dtype = AMP_DTYPES[self.recipe.amp]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            x, targets = self.targets.mix(x, targets)
            loss, logits = self.criterion(self.state.runs, self.model, x, targets)
        torch.autograd.backward(self.state.scaler.scale(loss / self.recipe.accumulate))
        n_correct = (logits.argmax(1) == y).sum()
        self.state.meter.add(loss, n_correct, len(y))

    def _step_optimizer(self) -> None:
        """Complete and clip the gradients, step the optimiser by them, and clear them."""
        recipe, state = self.recipe, self.state
        if recipe.anchor or recipe.balance or recipe.clip:
            state.scaler.unscale_(state.optimizer)
        if recipe.anchor:
            add_anchor_(self.model, recipe.anchor)
        if recipe.balance:
            add_balance_(self.model, recipe.balance)
        if recipe.clip is not None:
            clipped = select_clipped_parameters(self.model)
            dispatch_clip_grad(clipped, recipe.clip.value, recipe.clip.mode)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()

    def _measure_progress(self, updates_per_second: float) -> Progress:
        """Compute the means over the epoch so far, on all processes.

        Raises:
            TrainingError: the loss is NaN or infinite.
        """
        state = self.state
        loss, n_correct, n_images = self.processes.sum(*state.meter.sums.tolist())
        if not math.isfinite(loss):
            raise make_divergence_error(f"the loss is {loss / n_images}", self.recipe, state.epoch)
        return Progress(
            epoch=state.epoch + 1,
            epochs=self.recipe.epochs,
            update=state.update,
            updates=self.loader.updates,
            loss=loss / n_images,
            top1=100 * n_correct / n_images if self.recipe.uses_labels else None,
            images_per_second=updates_per_second * self.recipe.batch_size,
            changed=state.meter.count_changed_entries(self.model),
            lr=state.learning_rate,
        )


def _skip_gradient_sync(wrapper: Any) -> contextlib.AbstractContextManager[None]:
    """Keep a DistributedDataParallel from synchronising gradients, which its last part does."""
    return wrapper.no_sync()  # type: ignore[no-any-return]
