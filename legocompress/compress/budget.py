"""Turn a budget for the whole network into m, o and k of each layer, some of which stay dense.

Layers differ: the early ones of a network hold few weights and do much of the work, the late ones
hold most weights and do little. One m for all of them spends bytes or MACs where they help least.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from legocompress.compress.convert import (
    fuse_for_plan,
    select_planned_layers,
    summarise_reasons,
)
from legocompress.compress.forms import (
    SHARES,
    cluster_forms,
    list_forms,
    make_form,
    read_settings,
    size_form,
)
from legocompress.compress.losses import Sensitivity
from legocompress.compress.plan_types import Plan
from legocompress.compress.planning import plan
from legocompress.compress.prices import Form, choose_forms
from legocompress.errors import PlanError, SpecError
from legocompress.spec import LegoSpec, Rule

LARGEST_M = 8.0  # Lego filters per output channel that a budget gives to shared banks
HALVINGS = 12
CORRECTIONS = 8  # rounds that replace estimated costs; then only measured forms are chosen from

Predictor = Callable[[float], float]  # from squared relative weight error to loss


def allocate(
    model: nn.Module,
    spec: LegoSpec | None = None,
    *,
    max_size: float | None = None,
    max_macs: float | None = None,
    seed: int = 0,
    example_input: Tensor | Any | None = None,
    sensitivity: Sensitivity | None = None,
    on_layer: Callable[[int, int], None] | None = None,
) -> LegoSpec:
    """Choose m, o and k of each layer so that the network keeps to a budget.

    Each layer is clustered at several m, o and k. With a sensitivity, the quality of a choice is
    the sum over the layers of the losses that were measured on images. Without, it is the product
    of the energy that is left of their weights, 1 minus the squared relative error. The best choice
    within the budget is searched by prices on both costs (Everett, 1963).

    Where the spec asks for shared banks, o and k stay as they are, and only m is chosen: one number
    for all layers, the largest within the budget. The bytes of a shared bank count once.

    Args:
        model: the dense network, which stays as it is.
        spec: the largest number of terms per slot (each layer gets k, k/2 or k/4), storage
            dtypes, and which layers to convert; its m is not used, and its o for shared banks only.
        max_size: limit for all parameters, norms included, as a share of the ideal dense size.
        max_macs: limit for all convs and Linears, as a share of the dense MACs. Only the Lego
            filters that a split uses are counted, since the kernels skip the others.
        seed: of the clustering.
        example_input: as `plan` takes it.
        sensitivity: what `lego.sensitivity` measured on this network.
        on_layer: called with the number of layers done and the number of all layers.

    Returns:
        The spec with one rule per layer to convert; layers that stay dense are skipped by name.

    Raises:
        SpecError: there is no budget, nothing meets it, the dense network meets it, or a rule
            sets m or (without shared banks) o, or the sensitivity lacks a layer or comes with
            shared banks.
        PlanError: no layer can be converted, the model is converted already, or it could not be run
            to count its MACs.
        UsageError: the model is wrapped, compiled or scripted.
        ConversionError: a layer's weights hold NaN or infinity, or are on the meta device.
    """
    spec = LegoSpec() if spec is None else spec
    budget = check_budget(spec, {"max_size": max_size, "max_macs": max_macs})
    if spec.is_sharing:
        if sensitivity is not None:
            raise SpecError(
                "a sensitivity chooses between settings of single layers, and with shared banks "
                "only m is chosen; leave out the sensitivity, or share=stage and share=network"
            )
        return _size_shared(model, spec, budget, example_input)
    smallest = spec.model_copy(update={"m": SHARES[0], "o": 1})
    base = plan(model, smallest, example_input)
    if not base.layers:
        raise PlanError(f"no layer can be converted: {summarise_reasons(base)}")
    if max_macs is not None and not base.dense_macs:
        raise PlanError(f"max_macs cannot be met, since the MACs could not be counted: {base.note}")
    layers = select_planned_layers(fuse_for_plan(model) if base.reparameterize else model, base)
    predictors = _make_predictors(sensitivity, base)
    choices = []
    for done, (name, row) in enumerate(base.layers.items(), 1):
        choices.append(list_forms(layers[name], row, seed, predictors[name]))
        if on_layer is not None:
            on_layer(done, len(layers))
    chosen = _choose_measured_forms(budget, base, choices, layers, seed, predictors)
    return _make_spec(spec, base, chosen)


def _make_predictors(sensitivity: Sensitivity | None, base: Plan) -> dict[str, Predictor | None]:
    """For each layer the function from squared weight error to loss; None without a sensitivity."""
    if sensitivity is None:
        return dict.fromkeys(base.layers)
    for name in base.layers:
        sensitivity.predict(name, 0.0)  # an unknown layer fails before anything is clustered
    return {name: partial(sensitivity.predict, name) for name in base.layers}


def _size_shared(
    model: nn.Module, spec: LegoSpec, budget: dict[str, float], example_input: Tensor | Any | None
) -> LegoSpec:
    """The spec with the largest m whose plan keeps to the budget, by halving, then bisection."""

    def measure_costs(m: float) -> dict[str, float]:
        planned = plan(model, spec.model_copy(update={"m": m}), example_input)
        if not planned.layers and m < SHARES[0]:
            raise PlanError(f"no layer can be converted: {summarise_reasons(planned)}")
        if "max_macs" in budget and not planned.dense_macs:
            raise PlanError(
                f"max_macs cannot be met, since the MACs could not be counted: {planned.note}"
            )
        return {
            "max_size": planned.bits / planned.dense_bits,
            "max_macs": planned.macs / max(1, planned.dense_macs),
        }

    def is_within(costs: dict[str, float]) -> bool:
        return all(costs[name] <= limit for name, limit in budget.items())

    largest = LARGEST_M if spec.share != "layer" or spec.allow_expansion else 1.0
    # Costs may also fall as m grows, since a layer alone with few filters may stay dense.
    tried = {largest / 2**step: measure_costs(largest / 2**step) for step in range(HALVINGS)}
    low = max((m for m, costs in tried.items() if is_within(costs)), default=None)
    if low is None:
        least = min(
            tried.values(), key=lambda costs: max(costs[name] / budget[name] for name in budget)
        )
        left = ", ".join(f"{name}={math.ceil(1000 * least[name]) / 1000:g}" for name in budget)
        limits = " and ".join(f"{name}={limit:g}" for name, limit in budget.items())
        raise SpecError(
            f"{limits} cannot be met: with shared banks, o={spec.o} and k={spec.k}, the nearest is "
            f"{left}; give that or more, or a smaller o or k"
        )
    high = min(2 * low, largest)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_within(measure_costs(middle)) else (low, middle)
    return spec.model_copy(update={"m": low})


def check_budget(spec: LegoSpec, limits: Mapping[str, float | None]) -> dict[str, float]:
    """Return the limits that are given, by name, after checking that they can be meant.

    Raises:
        SpecError: there is no limit, one is not in (0, 1], or a rule of the spec sets m or o.
    """
    budget = {name: limit for name, limit in limits.items() if limit is not None}
    if not budget:
        raise SpecError("a budget is needed: max_size, max_macs or both")
    for name, limit in budget.items():
        if not 0 < limit <= 1:
            raise SpecError(
                f"{name}={limit:g} is not a share of the dense network; give a number in (0, 1]"
            )
    for rule in spec.rules:
        if rule.m is not None or (rule.o is not None and not spec.is_sharing):
            raise SpecError(
                f"rule {rule.pattern!r} sets m or o, which the budget chooses for every layer; "
                "leave them out of the rule, or leave out the budget"
            )
    return budget


def _choose_measured_forms(
    budget: dict[str, float],
    base: Plan,
    choices: Sequence[list[Form]],
    layers: dict[str, nn.Conv2d | nn.Linear],
    seed: int,
    predictors: Mapping[str, Predictor | None],
) -> list[Form]:
    """Choose forms by measured costs: cluster what was chosen by an estimate, and repeat."""
    for _ in range(CORRECTIONS):
        chosen = choose_forms(budget, base, choices)
        if "max_macs" not in budget or not any(choice.estimated for choice in chosen):
            return chosen
        for options, choice, row in zip(choices, chosen, base.layers.values(), strict=True):
            if choice.estimated and choice.shape is not None:
                shape, spec = size_form(row, *read_settings(choice.shape))
                measured = cluster_forms(layers[row.name], row, [shape], seed)[shape]
                options[options.index(choice)] = make_form(
                    row, shape, spec, *measured, False, predictors[row.name]
                )
    measured_only = [[choice for choice in options if not choice.estimated] for options in choices]
    return choose_forms(budget, base, measured_only)


def _make_spec(spec: LegoSpec, base: Plan, chosen: Sequence[Form]) -> LegoSpec:
    if all(choice.shape is None for choice in chosen):
        raise SpecError("the budget leaves every layer dense; give less of the dense network")
    rules, skip = [], list(spec.skip)
    for row, choice in zip(base.layers.values(), chosen, strict=True):
        if choice.shape is None:
            skip.append(row.name)
            continue
        ours = spec.for_layer(row.name)
        same = {field: getattr(ours, field) for field in ("coefficients", "dtype")}
        m, o, k = read_settings(choice.shape)
        rules.append(Rule(pattern=row.name, m=m, o=o, k=k, **same))
    return spec.model_copy(update={"rules": tuple(rules), "skip": tuple(skip)})
