"""Kinds of parameters, weight decay, rates over a schedule, and gradients of proxies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import legocompress as lego
from legocompress.errors import UsageError
from legocompress.finetune.optimize import (
    KINDS,
    add_anchor_,
    add_balance_,
    classify_parameters,
    drop_proxies_,
    make_optimizer,
    make_schedule,
    select_clipped_parameters,
    set_rates_,
)
from legocompress.finetune.recipe import Optimizer, Rates
from legocompress.lego.proxy import balance_gradient
from tests.support.tiny import compressed, recipe


def network() -> nn.Module:
    return lego.train_indices_(compressed())


def test_every_parameter_has_its_kind() -> None:
    model = network()
    kinds = classify_parameters(model)
    assert kinds.keys() == dict(model.named_parameters()).keys()
    assert kinds["layer1.0.conv1.lego_filters"] == "filters"
    assert kinds["layer1.0.conv1.proxy"] == "proxies"
    assert kinds["layer1.0.conv1.coefficients"] == "coefficients"
    assert kinds["layer1.0.bn1.weight"] == kinds["bn1.bias"] == "norms"
    assert kinds["conv1.weight"] == kinds["fc.weight"] == kinds["fc.bias"] == "rest"


def test_only_filters_and_dense_weights_decay() -> None:
    model = network()
    optimizer = make_optimizer(model, Optimizer(lr=0.1, weight_decay=0.01))
    names = {id(p): name for name, p in model.named_parameters()}
    decays = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays.keys() == set(names.values())
    assert [g["kind"] for g in optimizer.param_groups] == [*KINDS, "rest"]
    for name, decay in decays.items():
        expected = name.endswith("lego_filters") or name in ("conv1.weight", "fc.weight")
        assert decay == (0.01 if expected else 0), name


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw", "lamb", "lion", "rmsproptf", "nmuon"])
def test_optimisers_of_timm_make_finite_steps(name: str) -> None:
    model = network()
    optimizer = make_optimizer(model, Optimizer(name=name, lr=0.1))
    model(torch.randn(2, 1, 16, 16)).square().mean().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_muon_takes_neither_coefficients_nor_proxies() -> None:
    model = network()
    optimizer = make_optimizer(model, Optimizer(name="muon", lr=0.1))
    model(torch.randn(2, 1, 16, 16)).square().mean().backward()
    optimizer.step()
    for name, kind in classify_parameters(model).items():
        if kind != "rest":  # timm finds some of these too narrow
            assert optimizer.state[model.get_parameter(name)]["use_muon"] == (kind == "filters")


@pytest.mark.parametrize("settings", [{"name": "no_such"}, {"options": {"betaz": 1}}])
def test_an_optimiser_that_timm_refuses_is_reported(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="timm refuses"):
        make_optimizer(network(), Optimizer(lr=0.1, **settings))


def test_rates_multiply_the_schedule() -> None:
    model = network()
    optimizer = make_optimizer(model, Optimizer(lr=0.1))
    settings = recipe(stages=[{"epochs": 4}], schedule={"name": "cosine", "warmup_epochs": 1})
    set_rates_(model, optimizer, Rates(filters=0.5, proxies=100, norms=0))
    schedule = make_schedule(optimizer, settings, 10)
    history = []
    for update in range(40):
        schedule.step_update(update)
        rates = {g["kind"]: g["lr"] for g in optimizer.param_groups}
        assert rates["filters"] == pytest.approx(0.5 * rates["rest"])
        assert rates["proxies"] == pytest.approx(100 * rates["rest"])
        assert rates["norms"] == 0
        history.append(rates["rest"])
    assert history[0] < history[5] < history[9]
    assert max(history) <= 0.1
    assert max(history) > 0.08
    assert history[39] < 0.01
    assert not model.get_parameter("bn1.weight").requires_grad
    assert model.get_parameter("fc.weight").requires_grad


def test_a_constant_schedule_keeps_the_rate() -> None:
    optimizer = make_optimizer(network(), Optimizer(lr=0.1))
    schedule = make_schedule(optimizer, recipe(schedule={"name": "constant"}), 10)
    for update in range(20):
        schedule.step_update(update)
        assert optimizer.param_groups[0]["lr"] == 0.1


def test_proxies_are_dropped_with_their_states() -> None:
    model = network()
    optimizer = make_optimizer(model, Optimizer(lr=0.1))
    model(torch.randn(2, 1, 16, 16)).square().mean().backward()
    optimizer.step()
    count = len(optimizer.state)
    proxies = sum(kind == "proxies" for kind in classify_parameters(model).values())
    drop_proxies_(optimizer)
    assert len(optimizer.state) == count - proxies
    assert len(optimizer.param_groups) == len(KINDS) + 1


def test_balance_is_added_to_the_proxies_gradient() -> None:
    model = network()
    model(torch.randn(2, 1, 16, 16)).square().mean().backward()
    (_, module), *_ = lego.lego_modules(model)
    assert module.proxy is not None
    assert module.proxy.grad is not None
    before = module.proxy.grad.clone()
    add_balance_(model, 0.5)
    expected = before + 0.5 * balance_gradient(module.lego_shape, module.index)
    torch.testing.assert_close(module.proxy.grad, expected)


def test_the_anchor_pulls_n_to_its_start() -> None:
    model = network()
    model(torch.randn(2, 1, 16, 16)).square().mean().backward()
    (_, module), *_ = lego.lego_modules(model)
    assert module.proxy is not None
    assert module.proxy.grad is not None
    before = module.proxy.grad.clone()
    add_anchor_(model, 0.5)
    torch.testing.assert_close(module.proxy.grad, before)  # N is at its start
    with torch.no_grad():
        module.proxy += 1  # type: ignore[misc]
    add_anchor_(model, 0.5)
    torch.testing.assert_close(module.proxy.grad, before + 0.5)


@pytest.mark.parametrize("k", [1, 3])
def test_an_anchored_index_fits_better_and_a_free_one_drifts(k: int) -> None:
    """The target is a layer's filters; a third of the index is wrong at the start."""
    torch.manual_seed(0)
    target = 0.1 * torch.randn(32, 16, 3, 3)
    start = nn.Conv2d(16, 32, 3, bias=False)
    with torch.no_grad():
        start.weight.copy_(target)
    lego.convert_(start, lego.plan(start, lego.LegoSpec(m=0.5, o=2, k=k, only=("",))))
    (_, clustered), *_ = lego.lego_modules(start)
    at_best = float((clustered.weight - target).detach().square().sum())
    wrong = torch.rand(2, 32) < 0.3
    with torch.no_grad():
        clustered.index[wrong] = torch.rand(2, 32, 16).argsort(2)[:, :, :k][wrong]
    error = {}
    for form, anchor in (("frozen", 0.0), ("free", 0.0), ("anchored", 1.0)):
        model = copy.deepcopy(start)
        (_, module), *_ = lego.lego_modules(model)
        if form != "frozen":
            lego.train_indices_(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for step in range(150):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 150)
            optimizer.zero_grad()
            (0.5 * (module.weight - target).square().sum()).backward()
            add_anchor_(model, anchor)
            optimizer.step()
        error[form] = float((module.weight - target).detach().square().sum())
    assert error["anchored"] < 0.97 * error["frozen"]
    assert error["anchored"] < error["free"]
    assert error["anchored"] < 1.1 * at_best


def test_proxies_are_not_clipped() -> None:
    model = network()
    clipped = {id(p) for p in select_clipped_parameters(model)}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in clipped) == (not name.endswith("proxy"))
