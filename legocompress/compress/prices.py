"""Choose one form per layer within a budget, by prices on the costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from legocompress.compress.plan_types import Plan
from legocompress.errors import SpecError
from legocompress.lego.shape import UnitShape

LARGEST = 1 - 1e-06  # squared errors
MIXES = 33  # of the prices of two budgets
DECADES = 12  # of prices up and down from one
HALVINGS = 50


@dataclass(frozen=True)
class Form:
    """One form of one layer; `shape` is None for the dense form.

    MACs count the Lego filters that are used; `estimated` says that the form was not clustered.
    """

    shape: UnitShape | None
    loss: float
    bits: int
    macs: int
    estimated: bool = False


def choose_forms(
    budget: dict[str, float], base: Plan, choices: Sequence[Sequence[Form]]
) -> list[Form]:
    """Choose one form per layer: the least total loss within the budget that prices find."""
    costs, room = _tabulate_costs(budget, base, choices)
    losses = _tabulate(choices, "loss")
    best, least = None, math.inf
    for mix in torch.linspace(0, 1, MIXES).tolist() if len(budget) > 1 else [0.0]:
        shares = costs.new_tensor([1 - mix, mix][: len(budget)])
        priced = torch.einsum("b,blc->lc", shares, costs)
        chosen = _choose_at_least_price(losses, priced, costs, room)
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


def _choose_at_least_price(
    losses: Tensor, priced: Tensor, costs: Tensor, room: Tensor
) -> Tensor | None:
    """Minimise loss + price * cost per layer, at the least price whose choices fit into `room`.

    Returns the choices (layers, 1), or None where no price fits.
    """
    best = None
    low, high = -float(DECADES), float(DECADES)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        chosen = (losses + 10.0**middle * priced).argmin(1, keepdim=True)
        fits = bool((_select_costs(costs, chosen).sum((1, 2)) <= room).all())
        low, high = (low, middle) if fits else (middle, high)
        best = chosen if fits else best
    return best


def _spend_rest(chosen: Tensor, losses: Tensor, costs: Tensor, room: Tensor) -> Tensor:
    """Change one layer after another, where it helps most, until no change fits the budget.

    Prices find only choices on a convex hull, and leave a part of the budget unspent.
    """
    while True:
        now = _select_costs(costs, chosen)
        spent = now.sum((1, 2), keepdim=True) - now + costs
        fits = (spent <= room[:, None, None]).all(0)
        gains = torch.where(fits, losses.gather(1, chosen) - losses, 0.0)
        layer, choice = divmod(int(gains.argmax()), gains.shape[1])
        if gains[layer, choice] <= 0:
            return chosen
        chosen[layer] = choice


def _select_costs(costs: Tensor, chosen: Tensor) -> Tensor:
    """Costs (budgets, layers, 1) of the choices (layers, 1)."""
    return costs.gather(2, chosen.expand(len(costs), -1, 1))


def _tabulate_costs(
    budget: dict[str, float], base: Plan, choices: Sequence[Sequence[Form]]
) -> tuple[Tensor, Tensor]:
    """Costs (budgets, layers, choices) and their limits (budgets,), as shares of the network."""
    tables, room = [], []
    for name, share in budget.items():
        field = "bits" if name == "max_size" else "macs"
        costs = _tabulate(choices, field) / getattr(base, f"dense_{field}")
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


def _tabulate(choices: Sequence[Sequence[Form]], field: str) -> Tensor:
    """Tabulate a field of all choices as (layers, most choices); the first choice fills gaps."""
    width = max(len(options) for options in choices)
    rows = [[*options, *[options[0]] * (width - len(options))] for options in choices]
    values = [[getattr(choice, field) for choice in row] for row in rows]
    return torch.tensor(values, dtype=torch.float64)
