"""What trains in a stage, at which rates: timm's optimisers over kinds of parameters."""

from __future__ import annotations

from typing import Any, Literal

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from legocompress.errors import UsageError, first_line
from legocompress.finetune.recipe import Optimizer, Rates, Recipe
from legocompress.lego.module import lego_modules
from legocompress.lego.proxy import balance_gradient, start_proxy

Kind = Literal["filters", "proxies", "coefficients", "norms", "rest"]
KINDS: tuple[Kind, ...] = ("filters", "proxies", "coefficients", "norms", "rest")
LEGO_KINDS: dict[str, Kind] = {
    "lego_filters": "filters",
    "proxy": "proxies",
    "coefficients": "coefficients",
}


def kinds_of(model: nn.Module) -> dict[str, Kind]:
    """The kind of every parameter, by name."""
    legos = {name for name, _ in lego_modules(model)}
    kinds: dict[str, Kind] = {}
    for name, _ in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner in legos and leaf in LEGO_KINDS:
            kinds[name] = LEGO_KINDS[leaf]
        else:
            kinds[name] = "norms" if _is_norm(model.get_submodule(owner)) else "rest"
    return kinds


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm: of torch or timm by its name, which custom ones share."""
    return "Norm" in type(module).__name__


def make_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """An optimiser with a group a kind, in the order of KINDS, and one of what never decays.

    Weight decay acts on Lego filters and dense weights alone: a coefficient or a proxy entry near
    zero says nothing about overfitting. Those are the matrices that Muon is for, too; it leaves
    the rest to AdamW. A group may be empty.

    Raises:
        UsageError: timm has no such optimiser, or it refuses the options.
    """
    kinds = kinds_of(model)
    groups: list[dict[str, Any]] = [
        {
            "params": [],
            "kind": kind,
            "weight_decay": settings.weight_decay * decays,
            "use_fallback": not decays,
        }
        for kind in KINDS
        for decays in ((True, False) if kind == "rest" else (kind == "filters",))
    ]
    for name, parameter in model.named_parameters():
        position = KINDS.index(kinds[name])
        if kinds[name] == "rest" and parameter.dim() < 2:
            position += 1
        groups[position]["params"].append(parameter)
    options = dict(settings.options)
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            groups,
            opt=settings.name,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            **options,
        )
    # Every optimiser has its own way to refuse an argument.
    except Exception as error:
        raise UsageError(
            f"optimizer: timm refuses {settings.name!r} with {options}: {first_line(error)}"
        ) from error
    return optimizer


def make_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, updates: int) -> Any:
    """timm's schedule over all epochs, stepped by the number of updates done."""
    settings = recipe.schedule

    def counted(epochs: float) -> int:
        return round(epochs * updates)

    constant = settings.name == "constant"
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched="step" if constant else settings.name,
        num_epochs=counted(recipe.epochs),
        warmup_epochs=counted(settings.warmup_epochs),
        warmup_lr=settings.warmup_lr,
        min_lr=settings.min_lr,
        decay_epochs=counted(2 * recipe.epochs if constant else settings.decay_epochs),
        decay_milestones=[counted(epoch) for epoch in settings.decay_milestones],
        decay_rate=settings.decay_rate,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return schedule


def set_rates_(model: nn.Module, optimizer: torch.optim.Optimizer, rates: Rates) -> None:
    """Make the kinds of parameters learn at a stage's rates; those at rate 0 need no gradient."""
    for group in optimizer.param_groups:
        group["lr_scale"] = getattr(rates, group["kind"])
    kinds = kinds_of(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(getattr(rates, kinds[name]) > 0)


def forget_proxies_(optimizer: torch.optim.Optimizer) -> None:
    """Drop the proxies and their states."""
    for group in optimizer.param_groups:
        if group["kind"] == "proxies":
            for parameter in group["params"]:
                optimizer.state.pop(parameter, None)
            group["params"] = []


@torch.no_grad()
def add_balance_(model: nn.Module, weight: float) -> None:
    """Add the balance term of the authors' released code to the gradients of the proxies."""
    for _, module in lego_modules(model):
        if module.proxy is not None and module.proxy.grad is not None:
            module.proxy.grad += weight * balance_gradient(module.lego_shape, module.index).to(
                module.proxy.grad
            )


@torch.no_grad()
def add_anchor_(model: nn.Module, weight: float) -> None:
    """Draw the proxies to where they would start from the filters, indices and coefficients of now.

    The gradient of weight / 2 * |N - start|^2. What keeps the loss from its minimum is in dN at
    every step; without an anchor N adds it up for ever, until filters enter that serve worse.
    """
    for _, module in lego_modules(model):
        if module.proxy is not None and module.proxy.grad is not None:
            start = start_proxy(module.lego_shape, module.lego_unit)
            module.proxy.grad += weight * (module.proxy - start)


def clipped_parameters(model: nn.Module) -> list[Tensor]:
    """The parameters whose gradients are clipped: all that train but the proxies."""
    kinds = kinds_of(model)
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and kinds[name] != "proxies"
    ]
