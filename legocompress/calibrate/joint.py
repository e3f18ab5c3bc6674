"""After the layers: re-estimate norm statistics, and tune all Lego values together.

Both steps work towards the original network and read no labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from legocompress.errors import DataError
from legocompress.models.outputs import find_logits, flatten_float_tensors

RATES = (4e-3, 1e-3)  # a network without norms can diverge at the higher one
TRIAL = 16  # a trial of a rate takes 1/16 of the epochs
LEAD = 1.3  # short trials favour low rates, so a lower rate must win by more than this factor
WARM_UP = 0.1
PURE = 0.25  # share of the steps, at the end, without augmentation
OUTPUTS = 0.25  # weight of the outputs of the network against the mean over the inner maps


def output_error(model: nn.Module, original: nn.Module, batches: Sequence[Tensor]) -> float:
    """Relative error ||y - y'|| / ||y|| of all outputs, over batches (N, c, H, W)."""
    error = energy = 0.0
    with torch.no_grad():
        for images in batches:
            targets = flatten_float_tensors(original(images))
            outputs = flatten_float_tensors(model(images))
            _check_same_shapes(targets, outputs)
            for target, output in zip(targets, outputs, strict=True):
                error += float((target.double() - output).square().sum())
                energy += float(target.double().square().sum())
    return float((error / max(energy, 1e-30)) ** 0.5)


def _check_same_shapes(targets: list[Tensor], outputs: list[Tensor]) -> None:
    """Raise DataError if the tensors of two networks cannot be compared one by one."""
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (targets, outputs)]
    if shapes[0] != shapes[1]:
        raise DataError(
            f"the original returns tensors of shapes {shapes[0]} and the converted network "
            f"{shapes[1]}, so their outputs cannot be compared; calibrate a part of the networks "
            "that returns feature maps"
        )


def agreement(model: nn.Module, original: nn.Module, batches: Sequence[Tensor]) -> float | None:
    """Percentage of images with the same first class; None for outputs without (N, classes)."""
    same = total = 0
    with torch.no_grad():
        for images in batches:
            target = find_logits(original(images), len(images))
            output = find_logits(model(images), len(images))
            if target is None or output is None:
                return None
            same += int((target.argmax(1) == output.argmax(1)).sum())
            total += len(images)
    return 100 * same / total


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


@dataclass(frozen=True)
class JointTuning:
    """What is tuned together, and towards what.

    Attributes:
        model: in eval mode; changed in place.
        original: in eval mode; it gives the targets.
        images: (N, c, H, W).
        values: the parameters of the model to tune; the others stay.
        points: names of modules that return one tensor, whose outputs count, too.
        bases: for some of the values (r, ...) with D numbers per row, an orthogonal matrix (D, D);
            Adam works in the coordinates of its columns. `input_bases` computes them.
        batch_size: images per step.
        seed: of the order of the images and of their augmentation.
    """

    model: nn.Module
    original: nn.Module
    images: Tensor
    values: Sequence[nn.Parameter]
    points: Sequence[str]
    bases: Mapping[nn.Parameter, Tensor]
    batch_size: int
    seed: int


def tune_(
    tuning: JointTuning,
    epochs: int,
    rate: float,
    on_batch: Callable[[int, int], None] | None = None,
) -> None:
    """Tune values of all layers together, towards the maps of the original.

    Minimises, with Adam and a one-cycle schedule, the sum of squared errors of the outputs of the
    modules `points` and of the network. Each error is divided by its variance, and the outputs of
    the network weigh less. Images are mirrored at random and blended in pairs, since the original
    gives a target for any image; the last quarter of the steps uses them unchanged.

    Args:
        tuning: the networks, values and images.
        epochs: number of epochs.
        rate: the highest learning rate.
        on_batch: called with the number of batches done and of all batches.
    """
    images = tuning.images
    n_steps = epochs * math.ceil(len(images) / tuning.batch_size)
    optimiser = _AdamInBases(tuning.values, tuning.bases, rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser.adam, partial(_one_cycle, n_steps))
    generator = torch.Generator().manual_seed(tuning.seed)
    orders = (torch.randperm(len(images), generator=generator) for _ in range(epochs))
    batches = (chosen for order in orders for chosen in torch.split(order, tuning.batch_size))
    only_values = _require_gradients(tuning.model, tuning.values)
    with only_values, _channels_last(tuning.model, tuning.original):
        for step, chosen in enumerate(batches):
            inputs = images[chosen.to(images.device)]
            if step < (1 - PURE) * n_steps:
                inputs = _augment(inputs, generator)
            inputs = inputs.contiguous(memory_format=torch.channels_last)
            loss = _loss(tuning, inputs)
            for value in tuning.values:
                value.grad = None
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            if on_batch is not None:
                on_batch(step + 1, n_steps)


class _AdamInBases:
    """Adam for some values, which works in the coordinates of a basis where a value has one."""

    def __init__(
        self, values: Sequence[nn.Parameter], bases: Mapping[nn.Parameter, Tensor], rate: float
    ) -> None:
        self._turned = [
            (value, bases[value], nn.Parameter(value.detach().flatten(1) @ bases[value]))
            for value in values
            if value in bases
        ]
        plain = [value for value in values if value not in bases]
        self.adam = torch.optim.Adam([*plain, *(rows for _, _, rows in self._turned)], rate)

    def step(self) -> None:
        """Change the values by their gradients."""
        for value, basis, rows in self._turned:
            rows.grad = None if value.grad is None else value.grad.flatten(1) @ basis
        self.adam.step()
        with torch.no_grad():
            for value, basis, rows in self._turned:
                value.copy_((rows @ basis.T).reshape(value.shape))


@contextmanager
def _require_gradients(model: nn.Module, values: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let only some parameters of a model require gradients; restore the flags at the end."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for value in values:
            value.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None


def _loss(tuning: JointTuning, inputs: Tensor) -> Tensor:
    """The mean error of the maps at the points, plus the weighted errors of the outputs."""
    with torch.no_grad():
        targets = _maps(tuning.original, tuning.points, inputs)
    with torch.enable_grad():
        outputs = _maps(tuning.model, tuning.points, inputs)
        losses = [_relative_loss(a, b) for a, b in zip(outputs, targets, strict=True)]
        parts, ends = losses[: len(tuning.points)], losses[len(tuning.points) :]
        shares = [part / len(parts) for part in parts] + [OUTPUTS * end for end in ends]
        return torch.stack(shares).sum()


def tune_at_chosen_rate_(
    model: nn.Module,
    run: Callable[..., None],
    judge: Callable[[], float],
    epochs: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> None:
    """Try each of `RATES` for a few epochs, then tune at the best one.

    The best rate is the highest one that no lower rate beats by more than the factor `LEAD`.

    Args:
        model: the network that `run` changes.
        run: `tune_` of a `JointTuning`; it takes epochs, rate and on_batch.
        judge: computes the error of the model, which may be infinite or NaN.
        epochs: number of epochs after the trials.
        on_batch: called with the number of batches done and of all batches, trials included.
    """
    trial = max(1, epochs // TRIAL)
    epochs_of = [trial] * len(RATES) + [epochs]

    def report_stage(stage: int) -> Callable[[int, int], None] | None:
        if on_batch is None:
            return None

        def report(done: int, total: int) -> None:
            per_epoch = total // epochs_of[stage]
            on_batch(per_epoch * sum(epochs_of[:stage]) + done, per_epoch * sum(epochs_of))

        return report

    start = copy_state(model)
    errors = {}
    for stage, rate in enumerate(RATES):
        run(epochs=trial, rate=rate, on_batch=report_stage(stage))
        error = judge()
        errors[rate] = error if math.isfinite(error) else math.inf
        model.load_state_dict(start)
    limit = LEAD * min(errors.values())
    rate = next(rate for rate in RATES if errors[rate] <= limit)
    run(epochs=epochs, rate=rate, on_batch=report_stage(len(RATES)))


def copy_state(model: nn.Module) -> dict[str, Tensor]:
    """Copy the parameters and buffers of a network."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def _one_cycle(n_steps: int, step: int) -> float:
    """The share of the rate at a step: a linear warm-up times half a cosine down to zero."""
    rise = min(1.0, (step + 1) / max(1.0, WARM_UP * n_steps))
    return rise * (1 + math.cos(math.pi * step / n_steps)) / 2


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images, and blend each with the one before it in the batch."""
    draws = torch.rand(2, len(images), 1, 1, 1, generator=generator).to(images)
    images = torch.where(draws[0] < 0.5, images.flip(3), images)
    return torch.lerp(images, images.roll(1, 0), draws[1])


@contextmanager
def _channels_last(*networks: nn.Module) -> Iterator[None]:
    """Hold weights in channels_last, with which convolutions and pooling run fastest on CPUs."""
    changed = [n for n in networks if all(p.is_contiguous() for p in n.parameters())]
    try:
        for network in changed:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        yield
    finally:
        for network in changed:
            network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def _relative_loss(output: Tensor, target: Tensor) -> Tensor:
    """The mean squared error over the variance; over the square for one number, none for none."""
    if not target.numel():
        return output.sum()
    energy = target.var() if target.numel() > 1 else target.square().mean()
    return F.mse_loss(output, target) / energy.clamp(min=1e-12)


def _maps(network: nn.Module, points: Sequence[str], images: Tensor) -> list[Tensor]:
    """The outputs of the modules `points`, then those of the network."""
    outputs: list[Tensor] = []
    modules = [network.get_submodule(name) for name in points]
    # A copy, since the network may change the output in place.
    hooks = [m.register_forward_hook(lambda *a: outputs.append(a[2].clone())) for m in modules]
    try:
        result = network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs + flatten_float_tensors(result)
