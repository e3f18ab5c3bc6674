"""Compress a network by another method and repair it as calibration repairs Lego filters.

The ratio of a method is bisected to a budget of bytes or MACs; where a method has several variants,
held-out images choose. The first conv and the classifier keep their outputs.

Repair, with the same images as ours: layer by layer, in the order in which they run, each form is
fitted to the original's outputs on the inputs that the repaired layers before it give (reduced-rank
regression, least squares for Tucker's core and for what pruning left), where held-out images say
that this is better than the plain form; then norm statistics; then all parameters tuned together.
Palettes have no layer step: their codebooks are tuned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import legocompress as lego
from benchmarks.rivals.costs import COSTS, count_macs, count_stored_bytes, find_largest_ratio
from benchmarks.rivals.low_rank import SVD, TUCKER
from benchmarks.rivals.palette import palettise
from benchmarks.rivals.pruning import PRUNING
from benchmarks.rivals.shrunk import Shrink, get_convs
from legocompress.calibrate.basis import input_bases
from legocompress.calibrate.calibration import _keep_if_better
from legocompress.calibrate.front import Front, steps
from legocompress.calibrate.joint import (
    RATES,
    JointTuning,
    copy_state,
    output_error,
    reestimate_norms_,
    tune_,
)
from legocompress.calibrate.layers import DAMPING, HELD_OUT, SAMPLES, sample
from legocompress.calibrate.moments import Moments
from legocompress.calibrate.stream import run_to
from legocompress.models.probe import evaluating

SHRINKS: dict[str, dict[str, Shrink]] = {"svd": SVD, "tucker": TUCKER, "pruning": PRUNING}
METHODS = (*SHRINKS, "palette")
PACKAGES = {"tucker": "tensorly", "pruning": "torch_pruning", "palette": "sklearn"}
BATCH = 32
SEED_STRIDE = 1_000_003  # between the seeds of two layers

Budget = tuple[str, float]  # a kind of `COSTS` and the most of it


@dataclass(frozen=True)
class Repair:
    """How a rival is repaired.

    epochs: passes over the images when all parameters are tuned; 0 does not tune.
    seed: of sampled pixels, clustering and the order of batches.
    rates: learning rates that are tried; the one of least error stays.
    """

    epochs: int
    seed: int
    rates: Sequence[float] = RATES


def compress(
    method: str,
    original: nn.Module,
    names: Sequence[str],
    images: Tensor,
    budget: Budget | None,
    repair: Repair,
) -> tuple[nn.Module, dict[str, Any]]:
    """Compress some layers of a network and repair it.

    Args:
        method: one of `METHODS`.
        original: the network, which stays as it is.
        names: the convs to be compressed.
        images: (N, c, H, W), preprocessed; one in `HELD_OUT` is used by no step and judges all.
        budget: what the network may cost; None for palettes, which have no ratio.
        repair: epochs, seed and learning rates.

    Returns:
        The network, and the facts of a row: variant, ratio, rate, error on held-out images, costs.

    Raises:
        ValueError: the method cannot meet the budget.
    """
    held_out = torch.arange(len(images)) % HELD_OUT == HELD_OUT - 1
    used, judged = images[~held_out], torch.split(images[held_out], BATCH)
    with evaluating(original):
        targets = list_targets(original, names, images)
        variants = make_variants(method, original, names, images, budget, repair.seed)
        judges = {v: partial(output_error, n, original, judged) for v, (n, _) in variants.items()}
        for variant, (network, _) in variants.items():
            with evaluating(network):
                renew = partial(reestimate_norms_, network, torch.split(used, BATCH))
                _keep_if_better(network, judges[variant], renew)
        best = min(variants, key=lambda variant: judges[variant]())
        network, ratio = variants[best]
        tune = prepare_tuning(network, original, targets, images, used, repair)
        with evaluating(network):
            rates = repair.rates if repair.epochs else ()
            rate = tune_at_best_rate(network, judges[best], tune, rates)
            error = judges[best]()
    facts = {"variant": best, "ratio": ratio, "rate": rate, "held_out_error": error}
    costs = {"bytes": count_stored_bytes(network), "macs": count_macs(network)}
    return network, {**facts, **costs}


def make_variants(
    method: str,
    original: nn.Module,
    names: Sequence[str],
    images: Tensor,
    budget: Budget | None,
    seed: int,
) -> dict[str, tuple[nn.Module, float]]:
    """Each variant of a method within the budget, its layers fitted, and its ratio."""
    if method == "palette":
        return {"": (palettise(original, names, seed).eval(), 1.0)}
    assert budget is not None
    return {
        variant: shrink_and_fit(shrink, original, names, images, budget, seed)
        for variant, shrink in SHRINKS[method].items()
    }


def prepare_tuning(
    network: nn.Module,
    original: nn.Module,
    targets: Sequence[str],
    images: Tensor,
    used: Tensor,
    repair: Repair,
) -> Callable[[float], None]:
    """A function that tunes all parameters at a learning rate.

    Args:
        network: the rival, whose parameters are tuned.
        original: gives the outputs to tune towards.
        targets: modules whose outputs count too, where the rival's have the same shape.
        images: of which two show the shapes.
        used: the images to tune with.
        repair: epochs and seed.
    """
    shapes = steps(network, images[:2])
    original_shapes = steps(original, images[:2])
    alike = [name for name in targets if shapes[name].shape == original_shapes[name].shape]
    values = list(network.parameters())
    convs = [m for m in network.modules() if type(m) is nn.Conv2d]
    with evaluating(network):
        bases = input_bases(network, convs, used)
    tuning = JointTuning(network, original, used, values, alike, bases, BATCH, repair.seed)
    return partial(tune_, tuning, repair.epochs)


def list_targets(original: nn.Module, names: Sequence[str], images: Tensor) -> list[str]:
    """The modules whose outputs calibration tunes Lego filters towards, too."""
    front = Front((original, original), [images[:2]])
    for name in sorted(names, key=lambda n: front.steps[n].enter):
        front.advance(name)
    return front.passed


def shrink_and_fit(
    shrink: Shrink,
    original: nn.Module,
    names: Sequence[str],
    images: Tensor,
    budget: Budget,
    seed: int,
) -> tuple[nn.Module, float]:
    """The network within the budget, its layers fitted one after the other, and its ratio."""
    kind, most = budget
    ratio = find_largest_ratio(lambda r: COSTS[kind](shrink(original, names, r).network), most)
    shrunk = shrink(original, names, ratio)
    student = shrunk.start.eval()
    with evaluating(student):
        front = Front((original, student), torch.split(images, BATCH))
        for number, name in enumerate(sorted(names, key=lambda n: front.steps[n].enter)):
            front.advance(name)
            moments, held_out = sum_moments(
                front, name, shrunk.channels.get(name), seed + SEED_STRIDE * number
            )
            shrunk.fit(student, name, moments, held_out)
    return student, ratio


def sum_moments(
    front: Front, name: str, channels: Tensor | None, seed: int
) -> tuple[Moments, Moments]:
    """Moments of the student's inputs and the original's outputs: of most images, and held out."""
    generator = torch.Generator().manual_seed(seed)
    per_image = -(-SAMPLES // sum(len(images) for images in front.images))
    conv = get_convs(front.networks[1], [name])[name]
    weight = conv.weight.detach().flatten(1)[None]
    device = weight.device
    both = [Moments(1, weight.shape[2], weight.shape[1], 1, device) for _ in range(2)]
    first = 0
    for original, student, images in front.batches():
        (target,) = run_to(original, original.get_submodule(name), 1, images)
        (call,) = run_to(student, conv, 1, images)
        image, position = sample(len(images), math.prod(call.size), per_image, generator)
        x = call.patches(image, position, conv.in_channels)
        target_patches = target.patches(image, position, target.weight.shape[1])
        y = target_patches @ target.weight.flatten(1).T
        y = y if channels is None else y[:, :, channels]
        is_held_out = (image + first) % HELD_OUT == HELD_OUT - 1
        both[0].add(x[~is_held_out], y[~is_held_out])
        both[1].add(x[is_held_out], y[is_held_out])
        first += len(images)
    both[0].finish(weight, DAMPING)
    both[1].finish(weight)
    return both[0], both[1]


def tune_at_best_rate(
    network: nn.Module,
    judge: Callable[[], float],
    tune: Callable[[float], None],
    rates: Sequence[float],
) -> float | None:
    """Tune at each rate from the same start and keep the best; None where the start is best."""
    start = best = copy_state(network)
    error, chosen = judge(), None
    for rate in rates:
        network.load_state_dict(start)
        tune(rate)
        if (now := judge()) < error:
            error, chosen, best = now, rate, copy_state(network)
    network.load_state_dict(best)
    return chosen


def list_planned(network: nn.Module, spec: lego.LegoSpec) -> list[str]:
    """The layers that Lego filters replace."""
    return list(lego.plan(network, spec).layers)
