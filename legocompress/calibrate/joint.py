"""After the layers: norm statistics, and all Lego values together, against the original network.

No label is read. Either step stays only where images that it did not use say that it helps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

RATES = (4e-3, 1e-3)  # a network without norms falls apart at the higher one
TRIAL = 16  # the trial of a rate takes one part in so many of the passes
LEAD = 1.3  # short trials favour low rates: one must beat a higher rate by more than that
WARM_UP = 0.1
PURE = 0.25  # share of the steps, at the end, that see images as they are
OUTPUTS = 0.25  # weight of the network's outputs against the mean of the maps before them


def output_error(model: nn.Module, original: nn.Module, batches: Sequence[Tensor]) -> float:
    """Relative error ||y - y'|| / ||y|| of all outputs, over batches (N, c, H, W)."""
    error = energy = 0.0
    with torch.no_grad():
        for images in batches:
            both = zip(_tensors(original(images)), _tensors(model(images)), strict=True)
            for wanted, found in both:
                error += float((wanted.double() - found).square().sum())
                energy += float(wanted.double().square().sum())
    return float((error / max(energy, 1e-30)) ** 0.5)


def agreement(model: nn.Module, original: nn.Module, batches: Sequence[Tensor]) -> float | None:
    """Percentage of images on which both have the same first class; None for other outputs."""
    same = seen = 0
    with torch.no_grad():
        for images in batches:
            wanted, found = original(images), model(images)
            if not isinstance(wanted, Tensor) or wanted.dim() != 2:
                return None
            same += int((wanted.argmax(1) == found.argmax(1)).sum())
            seen += len(images)
    return 100 * same / seen


def reestimate_norms_(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Replace the statistics of every BatchNorm by their averages over the batches."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.training = True
        with torch.no_grad():
            for images in batches:
                model(images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum, norm.training = momentum, False


def tune_(
    model: nn.Module,
    original: nn.Module,
    images: Tensor,
    values: Sequence[nn.Parameter],
    points: Sequence[str],
    epochs: int,
    batch_size: int,
    seed: int,
    rate: float,
    bases: Mapping[nn.Parameter, Tensor],
    on_batch: Callable[[int, int], None] | None = None,
) -> None:
    """Tune values of all layers together, towards the original's maps.

    Minimises the squared error of what the modules `points` and the network put out, each divided
    by its variance, the network's own weighing less, by Adam with a one-cycle rate. But for the
    last quarter of the steps, images are mirrored at random and blended by pairs, since the
    original tells what it does on any image. Nothing but `values` changes.

    Args:
        model: in eval mode; changed in place.
        original: in eval mode.
        images: (N, c, H, W).
        values: of the model, to be changed.
        points: names of modules that return one tensor.
        epochs: passes over the images.
        batch_size: images of a step.
        seed: of the images' order and of how they are varied.
        rate: the highest learning rate.
        bases: of some of the values, (r, ...) of D numbers a row: orthogonal matrices (D, D) in
            whose coordinates Adam sees the rows; `input_bases` makes them.
        on_batch: called with batches done and in all.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    n_steps = epochs * math.ceil(len(images) / batch_size)
    turned = [
        (value, bases[value], nn.Parameter(value.detach().flatten(1) @ bases[value]))
        for value in values
        if value in bases
    ]
    plain = [value for value in values if value not in bases]
    optimiser = torch.optim.Adam([*plain, *(rows for _, _, rows in turned)], rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, partial(_one_cycle, n_steps))
    generator = torch.Generator().manual_seed(seed)
    orders = (torch.randperm(len(images), generator=generator) for _ in range(epochs))
    batches = (chosen for order in orders for chosen in torch.split(order, batch_size))
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for value in values:
            value.requires_grad_(True)
        with _channels_last(model, original):
            for step, chosen in enumerate(batches):
                inputs = images[chosen.to(images.device)]
                if step < (1 - PURE) * n_steps:
                    inputs = _varied(inputs, generator)
                inputs = inputs.contiguous(memory_format=torch.channels_last)
                with torch.no_grad():
                    wanted = _maps(original, points, inputs)
                with torch.enable_grad():
                    found = _maps(model, points, inputs)
                    losses = [_relative(a, b) for a, b in zip(found, wanted, strict=True)]
                    parts, ends = losses[: len(points)], losses[len(points) :]
                    shares = [part / len(parts) for part in parts] + [OUTPUTS * end for end in ends]
                    loss = torch.stack(shares).sum()
                    for value in values:
                        value.grad = None
                    loss.backward()  # type: ignore[no-untyped-call]
                for value, basis, rows in turned:
                    rows.grad = None if value.grad is None else value.grad.flatten(1) @ basis
                optimiser.step()
                schedule.step()
                with torch.no_grad():
                    for value, basis, rows in turned:
                        value.copy_((rows @ basis.T).reshape(value.shape))
                if on_batch is not None:
                    on_batch(step + 1, n_steps)
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None


def tune_at_chosen_rate_(
    model: nn.Module,
    run: Callable[..., None],
    judge: Callable[[], float],
    epochs: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> None:
    """Try each of `RATES` for a few passes, then tune at the highest that holds its own.

    Args:
        model: that `run` changes.
        run: `tune_`, with all arguments but epochs, rate and on_batch.
        judge: the error of the model; it may be no finite number.
        epochs: passes after the trials.
        on_batch: called with batches done and in all, trials included.
    """
    trial = max(1, epochs // TRIAL)
    passes = [trial] * len(RATES) + [epochs]

    def told(stage: int) -> Callable[[int, int], None] | None:
        if on_batch is None:
            return None

        def tell(done: int, of: int) -> None:
            a_pass = of // passes[stage]
            on_batch(a_pass * sum(passes[:stage]) + done, a_pass * sum(passes))

        return tell

    start = copy_of_state(model)
    errors = {}
    for stage, rate in enumerate(RATES):
        run(epochs=trial, rate=rate, on_batch=told(stage))
        error = judge()
        errors[rate] = error if math.isfinite(error) else math.inf
        model.load_state_dict(start)
    limit = LEAD * min(errors.values())
    rate = next(rate for rate in RATES if errors[rate] <= limit)
    run(epochs=epochs, rate=rate, on_batch=told(len(RATES)))


def copy_of_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters and buffers of a network."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def _one_cycle(n_steps: int, step: int) -> float:
    """The share of the rate at a step: a linear start, then half a cosine down to nothing."""
    rise = min(1.0, (step + 1) / max(1.0, WARM_UP * n_steps))
    return rise * (1 + math.cos(math.pi * step / n_steps)) / 2


def _varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images, and blend each with the one before, which is any other."""
    draws = torch.rand(2, len(images), 1, 1, 1, generator=generator).to(images)
    images = torch.where(draws[0] < 0.5, images.flip(3), images)
    return torch.lerp(images, images.roll(1, 0), draws[1])


@contextmanager
def _channels_last(*networks: nn.Module) -> Iterator[None]:
    """Hold weights so that convolutions and pooling run fastest on CPUs."""
    changed = [n for n in networks if all(p.is_contiguous() for p in n.parameters())]
    try:
        for network in changed:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        yield
    finally:
        for network in changed:
            network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def _relative(found: Tensor, wanted: Tensor) -> Tensor:
    return F.mse_loss(found, wanted) / wanted.var().clamp(min=1e-12)


def _maps(network: nn.Module, points: Sequence[str], images: Tensor) -> list[Tensor]:
    """What the modules `points` put out, then the network."""
    outputs: list[Tensor] = []
    modules = [network.get_submodule(name) for name in points]
    # A copy: the network may go on in place.
    hooks = [m.register_forward_hook(lambda *a: outputs.append(a[2].clone())) for m in modules]
    try:
        result = network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs + _tensors(result)


def _tensors(output: Any) -> list[Tensor]:
    return [v for v in tree_leaves(output) if isinstance(v, Tensor) and v.is_floating_point()]
