"""A budget for the whole network -> m, o and k of every layer, or that the layer stays dense.

Layers differ: the early ones of a network hold few weights and do much of the work, the late ones
hold most weights and do little. One m for all of them spends bytes or MACs where they help least.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from legocompress.convert import check_layers, dense_weight, reasons, relative_error, units_for
from legocompress.errors import PlanError, SpecError
from legocompress.plan import (
    LayerPlan,
    Plan,
    deployed_copy,
    no_gain,
    plan,
    unit_bits,
    unit_shape,
)
from legocompress.spec import LegoSpec, Rule, UnitShape
from legocompress.unit import assemble, lego_macs, used_filters

SPLITS = (1, 2, 4, 8)
TERMS = (1, 2, 4)  # what the most terms a slot are divided by
MOST_FRAGMENTS = 8192  # of a layer; more take too long to cluster several times
SHARES = (0.0625, 0.25, 0.5, 0.75)  # values of m that are clustered
STEP = 0.0625  # of the values of m that are chosen from, up to one
LARGEST, TINY = 1 - 1e-6, 1e-12  # squared errors
MIXES = 33  # of the prices of two budgets
DECADES = 12  # of prices up and down from one
HALVINGS = 50
CORRECTIONS = 8  # of estimates, until those of known MACs must do


@dataclass(frozen=True)
class Choice:
    """One form of one layer; dense where `shape` is None.

    MACs are those of the Lego filters that are used, `estimated` where the form was not clustered.
    """

    shape: UnitShape | None
    loss: float
    bits: int
    macs: int
    estimated: bool = False


def allocate(
    model: nn.Module,
    spec: LegoSpec | None = None,
    *,
    max_size: float | None = None,
    max_macs: float | None = None,
    seed: int = 0,
    example_input: Tensor | Any | None = None,
    on_layer: Callable[[int, int], None] | None = None,
) -> LegoSpec:
    """Choose m, o and k of each layer so that the network keeps to a budget.

    Every layer is clustered at several m, o and k. What is left of its weights' energy there, 1
    minus the squared relative error, is multiplied over the layers, and the largest product within
    the budget is sought by prices on both costs (Everett, 1963).

    Args:
        model: the dense network, which stays as it is.
        spec: the most terms a slot (k, or half or a quarter of it, is chosen for each layer),
            storage types, and which layers; its own m and o are not used.
        max_size: of all parameters, norms included, as a share of the dense network's ideal size.
        max_macs: of all convs and Linears, as a share of the dense network's; of Lego filters,
            those that some slot of a split names, since the kernels skip the others.
        seed: of the clustering.
        example_input: as `plan` takes it.
        on_layer: called with layers done and in all.

    Returns:
        The spec with a rule for each layer that is to be converted; those that stay dense are
        skipped by name.

    Raises:
        SpecError: no budget, one that nothing meets or that dense layers meet, or a rule that
            sets m or o.
        PlanError: no layer can be converted, the model is converted already, or it could not be run
            to count its MACs.
        ConversionError: a layer's weights hold NaN or infinity.
    """
    spec = LegoSpec() if spec is None else spec
    budget = _budget(spec, {"max_size": max_size, "max_macs": max_macs})
    smallest = spec.model_copy(update={"m": SHARES[0], "o": 1})
    base = plan(model, smallest, example_input)
    if not base.layers:
        raise PlanError(f"no layer can be converted: {reasons(base)}")
    if max_macs is not None and not base.dense_macs:
        raise PlanError(f"max_macs cannot be kept to, since MACs are not known: {base.note}")
    layers = check_layers(deployed_copy(model) if base.reparameterize else model, base)
    choices = []
    for done, (name, row) in enumerate(base.layers.items(), 1):
        choices.append(_choices(layers[name], row, seed))
        if on_layer is not None:
            on_layer(done, len(layers))
    return _spec(spec, base, _checked(budget, base, choices, layers, seed))


def _budget(spec: LegoSpec, limits: dict[str, float | None]) -> dict[str, float]:
    budget = {name: limit for name, limit in limits.items() if limit is not None}
    if not budget:
        raise SpecError("a budget is needed: max_size, max_macs or both")
    for name, limit in budget.items():
        if not 0 < limit <= 1:
            raise SpecError(f"{name}={limit:g} is no share of the dense network; give 0 to 1")
    for rule in spec.rules:
        if rule.m is not None or rule.o is not None:
            raise SpecError(
                f"rule {rule.pattern!r} sets m or o, which the budget chooses for every layer; "
                "leave them out of the rule, or leave out the budget"
            )
    return budget


def _choices(layer: nn.Conv2d | nn.Linear, row: LayerPlan, seed: int) -> list[Choice]:
    """The dense layer and its Lego forms."""
    choices = [Choice(None, 0.0, row.dense_bits, row.dense_macs or 0)]
    n_out = row.weight_shape[0]
    for o in SPLITS:
        for k, known in _known(layer, row, o, seed).items():
            logs = _filled({n_lego: math.log(error) for n_lego, (error, _) in known.items()}, n_out)
            shares = _filled({n_lego: used for n_lego, (_, used) in known.items()}, n_out)
            for n_lego, log in logs.items():
                shape, spec = _form(row, n_lego / n_out, o, k)
                if no_gain(shape, spec, row.dense_bits) is None:
                    share = min(max(shares[n_lego], 0.0), 1.0)
                    estimated = share < 1 and n_lego not in known
                    choices.append(_choice(row, shape, spec, math.exp(log), share, estimated))
    return choices


def _known(
    layer: nn.Conv2d | nn.Linear, row: LayerPlan, o: int, seed: int
) -> dict[int, dict[int, tuple[float, float]]]:
    """What `_clustered` tells, by k and number of Lego filters."""
    assert row.spec is not None
    found: dict[int, dict[int, tuple[float, float]]] = {
        k: {} for k in sorted({max(1, row.spec.k // part) for part in TERMS})
    }
    for share in SHARES:
        shapes = {}
        for k in found:
            shape, spec = _form(row, share, o, k)
            # Where o does not divide the channels, another of `SPLITS` may stand for it.
            if shape.n_split != o or shape.n_fragments > MOST_FRAGMENTS:
                continue
            if no_gain(shape, spec, row.dense_bits) is None:
                shapes[k] = shape
        clustered = _clustered(layer, row, list(dict.fromkeys(shapes.values())), seed)
        for k, shape in shapes.items():
            found[k][shape.n_lego] = clustered[shape]
    return found


def _form(row: LayerPlan, m: float, o: int, k: int) -> tuple[UnitShape, LegoSpec]:
    assert row.spec is not None
    spec = row.spec.model_copy(update={"m": m, "o": o, "k": k})
    return unit_shape(row, spec), spec


def _settings(shape: UnitShape) -> tuple[float, int, int]:
    """m, o and k of a form."""
    return shape.n_lego / shape.n_out, shape.n_split, shape.n_terms


@torch.no_grad()
def _clustered(
    layer: nn.Conv2d | nn.Linear, row: LayerPlan, shapes: Sequence[UnitShape], seed: int
) -> dict[UnitShape, tuple[float, float]]:
    """The squared relative error, and the share of the Lego filters in all splits that is used.

    The shapes differ in their number of terms alone.
    """
    found: dict[UnitShape, tuple[float, float]] = {}
    if not shapes or row.spec is None:
        return found
    weight = dense_weight(layer, shapes[0])
    for shape, unit in zip(shapes, units_for(weight, shapes, row.spec, seed), strict=True):
        used = used_filters(shape, unit[1]) / (shape.groups * shape.n_split * shape.n_lego)
        found[shape] = max(relative_error(weight, assemble(shape, *unit)) ** 2, TINY), used
    return found


def _choice(
    row: LayerPlan, shape: UnitShape, spec: LegoSpec, error: float, used: float, estimated: bool
) -> Choice:
    macs = min(row.dense_macs or 0, lego_macs(shape, row.pixels or 0, used))
    return Choice(shape, signal_lost(error), unit_bits(shape, spec), macs, estimated)


def _filled(values: dict[int, float], n_out: int) -> dict[int, float]:
    """Values by number of Lego filters, also for numbers between and above, on straight lines."""
    filled = dict(values)
    known = sorted(values)
    if len(known) < 2:
        return filled
    for step in range(1, round(1 / STEP) + 1):
        n_lego = round(step * STEP * n_out)
        if n_lego < known[0]:
            continue
        a, b = next((p for p in pairwise(known) if n_lego <= p[1]), (known[-2], known[-1]))
        part = (n_lego - a) / (b - a)
        filled.setdefault(n_lego, (1 - part) * values[a] + part * values[b])
    return filled


def signal_lost(error: float) -> float:
    """What a layer costs: minus the logarithm of the share of its energy that is left.

    Layers work in a row, so their shares multiply and these costs add up.
    """
    return -math.log1p(-min(error, LARGEST))


def _checked(
    budget: dict[str, float],
    base: Plan,
    choices: Sequence[list[Choice]],
    layers: dict[str, nn.Conv2d | nn.Linear],
    seed: int,
) -> list[Choice]:
    """As `_within`, but with MACs that are known: what is chosen by an estimate is clustered."""
    for _ in range(CORRECTIONS):
        chosen = _within(budget, base, choices)
        if "max_macs" not in budget or not any(choice.estimated for choice in chosen):
            return chosen
        for options, choice, row in zip(choices, chosen, base.layers.values(), strict=True):
            if choice.estimated and choice.shape is not None:
                shape, spec = _form(row, *_settings(choice.shape))
                found = _clustered(layers[row.name], row, [shape], seed)[shape]
                options[options.index(choice)] = _choice(row, shape, spec, *found, False)
    known = [[choice for choice in options if not choice.estimated] for options in choices]
    return _within(budget, base, known)


def _within(
    budget: dict[str, float], base: Plan, choices: Sequence[Sequence[Choice]]
) -> list[Choice]:
    """One choice a layer, of least total loss within the budget as far as prices find it."""
    costs, room = _costs(budget, base, choices)
    losses = _table(choices, "loss")
    best, least = None, math.inf
    for mix in torch.linspace(0, 1, MIXES).tolist() if len(budget) > 1 else [0.0]:
        shares = costs.new_tensor([1 - mix, mix][: len(budget)])
        priced = torch.einsum("b,blc->lc", shares, costs)
        chosen = _at_least_price(losses, priced, costs, room)
        if chosen is None:
            continue
        chosen = _spend_rest(chosen, losses, costs, room)
        if (loss := float(losses.gather(1, chosen).sum())) < least:
            best, least = chosen[:, 0].tolist(), loss
    if best is None:
        limits = " and ".join(f"{name}={share:g}" for name, share in budget.items())
        raise SpecError(
            f"no choice of m, o and k meets {limits} together; give more of one of them"
        )
    return [options[i] for options, i in zip(choices, best, strict=True)]


def _at_least_price(losses: Tensor, priced: Tensor, costs: Tensor, room: Tensor) -> Tensor | None:
    """The choices (layers, 1) of least loss plus price, at the least price that keeps to `room`."""
    best = None
    low, high = -float(DECADES), float(DECADES)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        chosen = (losses + 10.0**middle * priced).argmin(1, keepdim=True)
        fits = bool((_each(costs, chosen).sum((1, 2)) <= room).all())
        low, high = (low, middle) if fits else (middle, high)
        best = chosen if fits else best
    return best


def _spend_rest(chosen: Tensor, losses: Tensor, costs: Tensor, room: Tensor) -> Tensor:
    """Change one layer after another, where it helps most, until no change fits the budget.

    Prices find the choices on a convex hull alone and leave what lies between two of them unspent.
    """
    while True:
        now = _each(costs, chosen)
        spent = now.sum((1, 2), keepdim=True) - now + costs
        fits = (spent <= room[:, None, None]).all(0)
        gains = torch.where(fits, losses.gather(1, chosen) - losses, 0.0)
        layer, choice = divmod(int(gains.argmax()), gains.shape[1])
        if gains[layer, choice] <= 0:
            return chosen
        chosen[layer] = choice


def _each(costs: Tensor, chosen: Tensor) -> Tensor:
    """Costs (budgets, layers, 1) of the choices (layers, 1)."""
    return costs.gather(2, chosen.expand(len(costs), -1, 1))


def _costs(
    budget: dict[str, float], base: Plan, choices: Sequence[Sequence[Choice]]
) -> tuple[Tensor, Tensor]:
    """Costs (budgets, layers, choices) and what they may add up to, as shares of the network's."""
    tables, room = [], []
    for name, share in budget.items():
        field = "bits" if name == "max_size" else "macs"
        costs = _table(choices, field) / getattr(base, f"dense_{field}")
        rest = 1 - float(costs[:, 0].sum())  # the first choice is the dense layer
        smallest = rest + float(costs.amin(1).sum())
        if smallest > share:
            raise SpecError(
                f"{name}={share:g} cannot be met: with these layers and settings at least "
                f"{math.ceil(1000 * smallest) / 1000:g} of the dense network is left; give that or "
                "more"
            )
        tables.append(costs)
        room.append(share - rest)
    return torch.stack(tables), tables[0].new_tensor(room)


def _table(choices: Sequence[Sequence[Choice]], field: str) -> Tensor:
    """A field of all choices as (layers, most choices); the first choice fills short rows."""
    width = max(len(options) for options in choices)
    rows = [[*options, *[options[0]] * (width - len(options))] for options in choices]
    values = [[getattr(choice, field) for choice in row] for row in rows]
    return torch.tensor(values, dtype=torch.float64)


def _spec(spec: LegoSpec, base: Plan, chosen: Sequence[Choice]) -> LegoSpec:
    if all(choice.shape is None for choice in chosen):
        raise SpecError("the budget leaves every layer dense; give less of the dense network")
    rules, skip = [], list(spec.skip)
    for row, choice in zip(base.layers.values(), chosen, strict=True):
        if choice.shape is None:
            skip.append(row.name)
            continue
        ours = spec.for_layer(row.name)
        same = {field: getattr(ours, field) for field in ("coefficients", "dtype")}
        m, o, k = _settings(choice.shape)
        rules.append(Rule(pattern=row.name, m=m, o=o, k=k, **same))
    return spec.model_copy(update={"rules": tuple(rules), "skip": tuple(skip)})
