"""timm's optimisers and schedules over kinds of parameters, and the gradients of proxies."""

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


def classify_parameters(model: nn.Module) -> dict[str, Kind]:
    """Map the name of every parameter to its kind."""
    lego_names = {name for name, _ in lego_modules(model)}
    kinds: dict[str, Kind] = {}
    for name, _ in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner in lego_names and leaf in LEGO_KINDS:
            kinds[name] = LEGO_KINDS[leaf]
        else:
            kinds[name] = "norms" if _is_norm(model.get_submodule(owner)) else "rest"
    return kinds


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm: by convention, "Norm" is in the names of their classes."""
    return "Norm" in type(module).__name__


def group_parameters(model: nn.Module, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Make groups for an optimiser, one per kind of parameter; each has the entry `kind`.

    The groups are in the order of KINDS, then one more of kind "rest" for biases and other
    parameters of fewer than two dimensions. A group may be empty.

    Weight decay acts on Lego filters and dense weights only, since small coefficients or proxy
    entries do not reduce overfitting. Muon updates the same two groups, whose parameters are
    matrices; it leaves all others to its fallback, AdamW.
    """
    kinds = classify_parameters(model)
    groups: list[dict[str, Any]] = [
        {
            "params": [],
            "kind": kind,
            "weight_decay": weight_decay * decays,
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
    return groups


def make_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """Create a timm optimiser with the groups of `group_parameters`.

    Raises:
        UsageError: timm has no such optimiser, or it refuses the options.
    """
    groups = group_parameters(model, settings.weight_decay)
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
    """Create timm's schedule over all epochs, stepped by the number of updates done.

    Args:
        optimizer: its groups' `lr_scale` multiplies the rate.
        recipe: its `schedule` block, in epochs.
        updates: number of updates per epoch.
    """
    settings = recipe.schedule

    def to_updates(epochs: float) -> int:
        return round(epochs * updates)

    constant = settings.name == "constant"
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched="step" if constant else settings.name,
        num_epochs=to_updates(recipe.epochs),
        warmup_epochs=to_updates(settings.warmup_epochs),
        warmup_lr=settings.warmup_lr,
        min_lr=settings.min_lr,
        decay_epochs=to_updates(2 * recipe.epochs if constant else settings.decay_epochs),
        decay_milestones=[to_updates(epoch) for epoch in settings.decay_milestones],
        decay_rate=settings.decay_rate,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return schedule


def set_rates_(model: nn.Module, optimizer: torch.optim.Optimizer, rates: Rates) -> None:
    """Set a stage's rates; parameters of a kind at rate 0 get no gradient."""
    for group in optimizer.param_groups:
        group["lr_scale"] = getattr(rates, group["kind"])
    kinds = classify_parameters(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(getattr(rates, kinds[name]) > 0)


def drop_proxies_(optimizer: torch.optim.Optimizer) -> None:
    """Remove the proxies and their optimiser states; their group stays, empty."""
    for group in optimizer.param_groups:
        if group["kind"] == "proxies":
            for parameter in group["params"]:
                optimizer.state.pop(parameter, None)
            group["params"] = []


@torch.no_grad()
def add_balance_(model: nn.Module, weight: float) -> None:
    """Add the gradient of the balance term of the authors' released code to that of the proxies."""
    for _, module in lego_modules(model):
        if module.proxy is not None and module.proxy.grad is not None:
            module.proxy.grad += weight * balance_gradient(module.lego_shape, module.index).to(
                module.proxy.grad
            )


@torch.no_grad()
def add_anchor_(model: nn.Module, weight: float) -> None:
    """Add the gradient of the anchor term, weight / 2 * |N - start|^2, to that of the proxies.

    `start` is the proxy that the current filters, indices and coefficients would start from.
    Whatever loss remains at the minimum still gives a dN at every step. Without an anchor, N adds
    these up without bound, until the index changes to filters that fit worse.
    """
    for _, module in lego_modules(model):
        if module.proxy is not None and module.proxy.grad is not None:
            start = start_proxy(module.lego_shape, module.lego_unit)
            module.proxy.grad += weight * (module.proxy - start)


def select_clipped_parameters(model: nn.Module) -> list[Tensor]:
    """Select the parameters whose gradients are clipped: all that train except proxies."""
    kinds = classify_parameters(model)
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and kinds[name] != "proxies"
    ]
