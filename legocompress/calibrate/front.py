"""Cache the maps of all images shortly before the layer that is being calibrated.

Without a cache, calibrating each layer would run the whole network up to it. Where the rest of the
network depends on the output of one module alone (a residual block, a stage), that output is cached
and the network resumes from there. We call such a module a cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from legocompress.models.outputs import flatten_tensors

BUDGET = 1 << 30  # bytes of cached maps per network


@dataclass(frozen=True)
class Step:
    """One module in a forward pass: when it is first entered and last left, and how often it runs.

    `shape` is the shape of its output per image, None where the output is not a tensor with one row
    per image.
    """

    enter: int
    leave: int
    calls: int
    shape: tuple[int, ...] | None


def steps(model: nn.Module, images: Tensor) -> dict[str, Step]:
    """Run the model once and record when its modules run."""
    seen: dict[str, Step] = {}
    clock = count()
    entered: dict[str, list[int]] = {}

    def enter(name: str) -> None:
        entered.setdefault(name, []).append(next(clock))

    def leave(name: str, output: Any) -> None:
        plain = isinstance(output, Tensor) and output.dim() > 0 and len(output) == len(images)
        times = entered[name]
        shape = tuple(output.shape[1:]) if plain else None
        seen[name] = Step(times[0], next(clock), len(times), shape)

    hooks = []
    for name, part in model.named_modules():
        if part is not model:
            hooks.append(part.register_forward_pre_hook(lambda *_, name=name: enter(name)))
            hooks.append(part.register_forward_hook(lambda *a, name=name: leave(name, a[2])))
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


class Front:
    """The cached maps of all batches in two networks of the same modules: original and student.

    Args:
        networks: both, in eval mode; only layers behind the cache may change in the meantime.
        batches: images (N, c, H, W), at least two in the first batch.
        budget: bytes of cached maps per network.
    """

    def __init__(
        self, networks: Sequence[nn.Module], batches: Sequence[Tensor], budget: int = BUDGET
    ) -> None:
        self.networks, self.images, self.budget = networks, batches, budget
        self._trial = batches[0][:2]
        self.steps = steps(networks[0], self._trial)
        self._wanted = _outputs(networks[0], self._trial)
        self._sound: dict[str, bool] = {}
        self.passed: list[str] = []
        self._cut: str | None = None
        self._kept = [[self._trial] * len(batches) for _ in networks]  # until there is a cut

    def advance(self, layer: str) -> None:
        """Move the cache to the last cut before `layer`, and run every batch up to it."""
        first = self.steps[layer].enter
        behind = -1 if self._cut is None else self.steps[self._cut].leave
        ready = [
            n
            for n, s in self.steps.items()
            if behind < s.leave < first and s.calls == 1 and s.shape is not None
        ]
        for name in sorted(ready, key=lambda n: -self.steps[n].leave):
            if self._is_cut(name):
                self.passed.append(name)
                if self._fits(name):
                    self._run_on(name)
                    self._cut = name
                return

    def batches(self) -> Iterator[tuple[nn.Module, nn.Module, Tensor]]:
        """Yield both networks, set to resume from their caches, and the batch to call them on."""
        for number, images in enumerate(self.images):
            with ExitStack() as both:
                for network, kept in zip(self.networks, self._kept, strict=True):
                    both.enter_context(self._start(network, kept[number]))
                yield self.networks[0], self.networks[1], images

    def _start(self, network: nn.Module, kept: Tensor) -> AbstractContextManager[None]:
        return nullcontext() if self._cut is None else self._resume(network, self._cut, kept)

    def _fits(self, name: str) -> bool:
        shape = self.steps[name].shape
        n_images = sum(len(batch) for batch in self.images)
        size = self._trial.element_size()
        assert shape is not None
        return n_images * math.prod(shape) * size <= self.budget

    def _is_cut(self, name: str) -> bool:
        """Whether the outputs stay bit-identical with zeros in place of all earlier maps."""
        if name not in self._sound:
            network = self.networks[0]
            value = _output_of(network, network.get_submodule(name), self._trial)
            with self._resume(network, name, value):
                try:
                    found = _outputs(network, self._trial)
                # With zeros the forward of a user may raise anything; then this is not a cut.
                except Exception:
                    found = []
            self._sound[name] = len(found) == len(self._wanted) and all(
                torch.equal(a, b) for a, b in zip(found, self._wanted, strict=True)
            )
        return self._sound[name]

    def _run_on(self, name: str) -> None:
        """Replace the cached maps by the outputs of the module, batch by batch."""
        for network, kept in zip(self.networks, self._kept, strict=True):
            module = network.get_submodule(name)
            for number, images in enumerate(self.images):
                with self._start(network, kept[number]):
                    kept[number] = _output_of(network, module, images)

    @contextmanager
    def _resume(self, network: nn.Module, cut: str, value: Tensor) -> Iterator[None]:
        """Let the cut return `value`, and all modules before it zeros, without running them."""
        end = self.steps[cut].leave
        replaced: list[nn.Module] = []
        stubs: list[str] = []
        try:
            for name, module in network.named_modules():
                step = self.steps.get(name)
                if step is None or step.leave > end or step.shape is None:
                    continue
                if any(name.startswith(f"{stub}.") for stub in stubs):
                    continue
                stubs.append(name)
                zeros = partial(_zeros, value, (len(value), *step.shape))
                # A copy each time, since the network may work in place.
                make = value.clone if name == cut else zeros
                module.__dict__["forward"] = lambda *_, make=make, **__: make()
                replaced.append(module)
            yield
        finally:
            for module in replaced:
                del module.__dict__["forward"]


def _zeros(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros of this device and dtype; on a CPU they take no memory until they are written to."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    n_bytes = math.prod(shape) * like.element_size()
    return torch.from_numpy(np.zeros(n_bytes, np.uint8)).view(like.dtype).reshape(shape)


class _Reached(Exception):
    """Ends a forward pass once the output of a module is there."""


@torch.no_grad()
def _output_of(network: nn.Module, module: nn.Module, images: Tensor) -> Tensor:
    outputs: list[Tensor] = []

    def catch(*values: Any) -> None:
        outputs.append(values[2].detach().clone())
        raise _Reached

    hook = module.register_forward_hook(catch)
    try:
        network(images)
    except _Reached:
        pass
    finally:
        hook.remove()
    return outputs[0]


@torch.no_grad()
def _outputs(network: nn.Module, images: Tensor) -> list[Tensor]:
    return [tensor.clone() for tensor in flatten_tensors(network(images))]
