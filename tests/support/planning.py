"""Small networks to plan, and checks that planning changed nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from legocompress.compress.plan_types import LayerPlan, Plan
from legocompress.compress.planning import plan
from legocompress.spec import LegoSpec

IMAGE = torch.zeros(1, 3, 8, 8)


def net(*layers: nn.Module) -> nn.Sequential:
    """A stem of 16 channels, then these layers."""
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *layers)


def small(
    model: nn.Module, spec: LegoSpec | None = None, image: Any = IMAGE, **settings: Any
) -> Plan:
    return plan(model, spec or LegoSpec(**settings), image)


def row(made: Plan, name: str) -> LayerPlan:
    return next(r for r in made.rows if r.name == name)


def assert_sums_to(made: Plan, model: nn.Module) -> None:
    """The rows and the rest must be the model itself, in numbers and in bits."""
    params = list(model.parameters())
    assert sum(r.dense_params for r in made.rows) + made.other_params == sum(
        p.numel() for p in params
    )
    assert sum(r.dense_bits for r in made.rows) + made.other_bits == sum(
        8 * p.numel() * p.element_size() for p in params
    )


def snapshot(model: nn.Module) -> dict[str, Any]:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modules = {
        name: (
            type(module),
            module.training,
            sorted(module.__dict__),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    }
    grads = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    return {"state": state, "modules": modules, "grads": grads}


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert after["modules"] == before["modules"]
    assert after["grads"] == before["grads"]
    assert list(after["state"]) == list(before["state"])
    for name, value in before["state"].items():
        assert torch.equal(after["state"][name], value)
