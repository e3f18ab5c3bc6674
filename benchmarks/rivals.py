"""Other ways to make a network smaller, each with the label-free repair that Lego filters get.

Of the forms in `shrink.py`, the ratio is bisected to a budget of bytes or of MACs; where a method
has several variants, held-out images choose. The first conv and the classifier keep their outputs
as they are.

Repair, on the same images as ours: layer by layer, in the order in which they run, each form is
fitted to the original's outputs on the inputs that the repaired layers before it give (reduced-rank
regression, least squares for Tucker's core and for what pruning left), where held-out images say
that this is better than the plain form; then norm statistics; then all parameters tuned together.
Palettes have no layer step: their codebooks are tuned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from shrink import PALETTE_BITS, SHRINKS, Palette, Shrink, convs_of, palettised
from torch import Tensor, nn

import legocompress as lego
from legocompress.calibrate.basis import input_bases
from legocompress.calibrate.calibration import _keep_if_better
from legocompress.calibrate.front import Front, steps
from legocompress.calibrate.joint import (
    RATES,
    copy_of_state,
    output_error,
    reestimate_norms_,
    tune_,
)
from legocompress.calibrate.layers import DAMPING, HELD_OUT, SAMPLES, sample
from legocompress.calibrate.moments import Moments
from legocompress.calibrate.stream import run_to
from legocompress.checkpoint.codec import encode
from legocompress.models.probe import default_input, evaluating
from legocompress.report.macs import count_macs_with_fvcore

METHODS = (*SHRINKS, "palette")
BATCH = 32
HALVINGS = 12
PACKAGES = {"tucker": "tensorly", "pruning": "torch_pruning", "palette": "sklearn"}


def stored_bytes(network: nn.Module) -> int:
    """Bytes of all tensors that a file would hold; of a palette, packed indices and codebook."""
    total = sum(t.numel() * t.element_size() for t in encode(network).values())
    for module in network.modules():
        if isinstance(module, Palette):
            packed = -(-module.number.numel() * PALETTE_BITS // 8)
            total += packed - module.number.numel() * module.number.element_size()
    return total


def macs(network: nn.Module) -> int:
    """Multiply-accumulates of one image, by fvcore."""
    image = default_input(network)
    assert image is not None
    counted = count_macs_with_fvcore(network, image)
    assert counted is not None
    return counted


COSTS: dict[str, Callable[[nn.Module], int]] = {"bytes": stored_bytes, "macs": macs}


def largest_ratio(cost: Callable[[float], float], budget: float) -> float:
    """The largest ratio in (0, 1] whose cost, which grows with it, is within the budget.

    Raises:
        ValueError: no ratio is.
    """
    if cost(1.0) <= budget:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    if not low:
        raise ValueError(f"no ratio costs at most {budget:g}")
    return low


def compress(
    method: str,
    original: nn.Module,
    names: Sequence[str],
    images: Tensor,
    budget: tuple[str, float] | None,
    epochs: int,
    seed: int,
    rates: Sequence[float] = RATES,
) -> tuple[nn.Module, dict[str, Any]]:
    """Compress the layers `names` by a method of `METHODS` and repair the network.

    Args:
        method: which.
        original: the network, which stays as it is.
        names: the convs to be compressed.
        images: (N, c, H, W), preprocessed; one in `HELD_OUT` is used by no step and judges all.
        budget: kind of cost of `COSTS` and the most of it; None for palettes, which have no ratio.
        epochs: passes over the images of the last step.
        seed: of sampled pixels, clustering and the order of batches.
        rates: learning rates of the last step; the one of least error stays.

    Raises:
        ValueError: the method cannot meet the budget.
    """
    held_out = torch.arange(len(images)) % HELD_OUT == HELD_OUT - 1
    used, kept = images[~held_out], torch.split(images[held_out], BATCH)
    with evaluating(original):
        points = _points(original, names, images)
        if method == "palette":
            found = {"": (palettised(original, names, seed).eval(), 1.0)}
        else:
            assert budget is not None
            found = {
                variant: _filled(shrink, original, names, images, budget, seed)
                for variant, shrink in SHRINKS[method].items()
            }
        judges = {v: partial(output_error, n, original, kept) for v, (n, _) in found.items()}
        for variant, (network, _) in found.items():
            with evaluating(network):
                renew = partial(reestimate_norms_, network, torch.split(used, BATCH))
                _keep_if_better(network, judges[variant], renew)
        best = min(found, key=lambda variant: judges[variant]())
        network, ratio = found[best]
        shapes = steps(network, images[:2])
        theirs = steps(original, images[:2])
        alike = [p for p in points if shapes[p].shape == theirs[p].shape]

        values = list(network.parameters())
        convs = [m for m in network.modules() if type(m) is nn.Conv2d]
        with evaluating(network):
            bases = input_bases(network, convs, used)

        def tune(rate: float) -> None:
            tune_(network, original, used, values, alike, epochs, BATCH, seed, rate, bases)

        with evaluating(network):
            rate = _best_rate(network, judges[best], tune, rates if epochs else ())
            error = judges[best]()
    facts = {"variant": best, "ratio": ratio, "rate": rate, "held_out_error": error}
    return network, {**facts, "bytes": stored_bytes(network), "macs": macs(network)}


def _points(original: nn.Module, names: Sequence[str], images: Tensor) -> list[str]:
    """The modules whose outputs Lego filters are tuned towards too."""
    front = Front((original, original), [images[:2]])
    for name in sorted(names, key=lambda n: front.steps[n].enter):
        front.advance(name)
    return front.passed


def _filled(
    shrink: Shrink,
    original: nn.Module,
    names: Sequence[str],
    images: Tensor,
    budget: tuple[str, float],
    seed: int,
) -> tuple[nn.Module, float]:
    """The network within the budget, its layers repaired one after the other, and its ratio."""
    kind, most = budget
    ratio = largest_ratio(lambda r: COSTS[kind](shrink(original, names, r).network), most)
    shrunk = shrink(original, names, ratio)
    student = shrunk.start.eval()
    with evaluating(student):
        front = Front((original, student), torch.split(images, BATCH))
        for number, name in enumerate(sorted(names, key=lambda n: front.steps[n].enter)):
            front.advance(name)
            seen, held_out = _moments(front, name, shrunk.kept.get(name), seed + 1_000_003 * number)
            shrunk.fit(student, name, seen, held_out)
    return student, ratio


def _moments(front: Front, name: str, kept: Tensor | None, seed: int) -> tuple[Moments, Moments]:
    """Sums of the student's inputs and the original's outputs, of most images and of the rest."""
    generator = torch.Generator().manual_seed(seed)
    per_image = -(-SAMPLES // sum(len(images) for images in front.images))
    conv = convs_of(front.networks[1], [name])[name]
    weight = conv.weight.detach().flatten(1)[None]
    device = weight.device
    both = [Moments(1, weight.shape[2], weight.shape[1], 1, device) for _ in range(2)]
    first = 0
    for original, student, images in front.batches():
        (target,) = run_to(original, original.get_submodule(name), 1, images)
        (call,) = run_to(student, conv, 1, images)
        image, position = sample(len(images), math.prod(call.size), per_image, generator)
        x = call.patches(image, position, conv.in_channels)
        wanted = target.patches(image, position, target.weight.shape[1])
        y = wanted @ target.weight.flatten(1).T
        y = y if kept is None else y[:, :, kept]
        held = (image + first) % HELD_OUT == HELD_OUT - 1
        both[0].add(x[~held], y[~held])
        both[1].add(x[held], y[held])
        first += len(images)
    both[0].finish(weight, DAMPING)
    both[1].finish(weight)
    return both[0], both[1]


def _best_rate(
    network: nn.Module,
    judge: Callable[[], float],
    tune: Callable[[float], None],
    rates: Sequence[float],
) -> float | None:
    """Tune at each rate from the same start; keep what is best, None where that is the start."""
    start = best = copy_of_state(network)
    error, chosen = judge(), None
    for rate in rates:
        network.load_state_dict(start)
        tune(rate)
        if (now := judge()) < error:
            error, chosen, best = now, rate, copy_of_state(network)
    network.load_state_dict(best)
    return chosen


def planned(network: nn.Module, spec: lego.LegoSpec) -> list[str]:
    """The layers that Lego filters take the place of."""
    return list(lego.plan(network, spec).layers)
