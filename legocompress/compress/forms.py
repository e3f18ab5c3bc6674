"""The forms that one layer may take in a budget, and what each of them costs and loses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn

from legocompress.compress.factorize import dense_weight, factorize_each, relative_error
from legocompress.compress.plan_types import LayerPlan
from legocompress.compress.prices import LARGEST, Form
from legocompress.compress.sizing import choose_shape, explain_no_gain
from legocompress.lego.algebra import assemble
from legocompress.lego.costs import count_used_filters, lego_macs, unit_bits
from legocompress.lego.shape import UnitShape
from legocompress.spec import LegoSpec

SPLITS = (1, 2, 4, 8)
TERM_DIVISORS = (1, 2, 4)  # each layer may use k, k/2 or k/4 terms per slot
MOST_FRAGMENTS = 8192  # per layer; more take too long to cluster several times
SHARES = (0.0625, 0.25, 0.5, 0.75)  # values of m that are clustered
STEP = 0.0625  # distance of the values of m to choose from, up to 1
TINY = 1e-12  # smallest squared error, whose logarithm is finite


def list_forms(
    layer: nn.Conv2d | nn.Linear,
    row: LayerPlan,
    seed: int,
    predict_loss: Callable[[float], float] | None = None,
) -> list[Form]:
    """List the forms of one layer: dense first, then its Lego forms.

    Args:
        layer: the layer.
        row: its plan.
        seed: of the clustering.
        predict_loss: what a form loses, from the squared relative error of its weight; by default
            `signal_lost`.
    """
    choices = [Form(None, 0.0, row.dense_bits, row.dense_macs or 0)]
    n_out = row.weight_shape[0]
    for o in SPLITS:
        for k, clustered in _cluster_all(layer, row, o, seed).items():
            logs = _interpolate(
                {n_lego: math.log(error) for n_lego, (error, _) in clustered.items()}, n_out
            )
            shares = _interpolate({n_lego: used for n_lego, (_, used) in clustered.items()}, n_out)
            for n_lego, log in logs.items():
                shape, spec = size_form(row, n_lego / n_out, o, k)
                if explain_no_gain(shape, spec, row.dense_bits) is None:
                    share = min(max(shares[n_lego], 0.0), 1.0)
                    estimated = share < 1 and n_lego not in clustered
                    error = math.exp(log)
                    choices.append(
                        make_form(row, shape, spec, error, share, estimated, predict_loss)
                    )
    return choices


def _cluster_all(
    layer: nn.Conv2d | nn.Linear, row: LayerPlan, o: int, seed: int
) -> dict[int, dict[int, tuple[float, float]]]:
    """Cluster a layer at each k and each of `SHARES`: k -> n_lego -> result of `cluster_forms`."""
    assert row.spec is not None
    results: dict[int, dict[int, tuple[float, float]]] = {
        k: {} for k in sorted({max(1, row.spec.k // part) for part in TERM_DIVISORS})
    }
    for share in SHARES:
        shapes = {}
        for k in results:
            shape, spec = size_form(row, share, o, k)
            # Where o does not divide the channels, the unit may get another of `SPLITS`.
            if shape.n_split != o or shape.n_fragments > MOST_FRAGMENTS:
                continue
            if explain_no_gain(shape, spec, row.dense_bits) is None:
                shapes[k] = shape
        clustered = cluster_forms(layer, row, list(dict.fromkeys(shapes.values())), seed)
        for k, shape in shapes.items():
            results[k][shape.n_lego] = clustered[shape]
    return results


def size_form(row: LayerPlan, m: float, o: int, k: int) -> tuple[UnitShape, LegoSpec]:
    """Sizes of the unit that a layer gets at m, o and k, and the spec that says so."""
    assert row.spec is not None
    spec = row.spec.model_copy(update={"m": m, "o": o, "k": k})
    return choose_shape(row, spec), spec


def read_settings(shape: UnitShape) -> tuple[float, int, int]:
    """m, o and k of a form."""
    return shape.n_lego / shape.n_out, shape.n_split, shape.n_terms


@torch.no_grad()
def cluster_forms(
    layer: nn.Conv2d | nn.Linear, row: LayerPlan, shapes: Sequence[UnitShape], seed: int
) -> dict[UnitShape, tuple[float, float]]:
    """Cluster a layer at shapes that differ in their number of terms alone.

    Returns, for each shape, the squared relative error and the share of the Lego filters that the
    splits use.
    """
    results: dict[UnitShape, tuple[float, float]] = {}
    if not shapes or row.spec is None:
        return results
    weight = dense_weight(layer, shapes[0])
    for shape, unit in zip(shapes, factorize_each(weight, shapes, row.spec, seed), strict=True):
        used = count_used_filters(shape, unit.index) / (shape.groups * shape.n_split * shape.n_lego)
        results[shape] = max(relative_error(weight, assemble(shape, unit)) ** 2, TINY), used
    return results


def make_form(
    row: LayerPlan,
    shape: UnitShape,
    spec: LegoSpec,
    error: float,
    used: float,
    estimated: bool,
    predict_loss: Callable[[float], float] | None = None,
) -> Form:
    """The form of these sizes: what it loses and costs; `used` is the share of filters in use."""
    loss = signal_lost(error) if predict_loss is None else predict_loss(error)
    macs = min(row.dense_macs or 0, lego_macs(shape, row.pixels or 0, used))
    return Form(shape, loss, unit_bits(shape, spec), macs, estimated)


def _interpolate(values: dict[int, float], n_out: int) -> dict[int, float]:
    """Interpolate values linearly over the number of Lego filters, and extrapolate above."""
    filled = dict(values)
    counts = sorted(values)
    if len(counts) < 2:
        return filled
    for step in range(1, round(1 / STEP) + 1):
        n_lego = round(step * STEP * n_out)
        if n_lego < counts[0]:
            continue
        a, b = next((p for p in pairwise(counts) if n_lego <= p[1]), (counts[-2], counts[-1]))
        part = (n_lego - a) / (b - a)
        filled.setdefault(n_lego, (1 - part) * values[a] + part * values[b])
    return filled


def signal_lost(error: float) -> float:
    """The loss of a layer: minus the logarithm of the share of its energy that is left.

    Layers follow each other, so their shares multiply and their losses add up.
    """
    return -math.log1p(-min(error, LARGEST))
