"""Budgets: kept to, spent where it helps most, and refused where they mean nothing."""

from __future__ import annotations

import copy
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from timm.models import create_model
from torch import Tensor, nn

import legocompress as lego
from legocompress.compress.factorize import relative_error
from legocompress.compress.forms import SHARES, SPLITS, _interpolate, signal_lost
from legocompress.compress.plan_types import Plan
from legocompress.compress.planning import plan
from legocompress.compress.prices import Form, choose_forms
from legocompress.errors import ConversionError, PlanError, SpecError
from legocompress.spec import LegoSpec

DEMO = Path(lego.__file__).parent / "demo" / "fashion-resnet"
IMAGE = torch.zeros(1, 3, 8, 8)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1)]
    for stride, width in ((1, 16), (2, 32), (1, 32)):
        channels = layers[-2].out_channels if len(layers) > 1 else 16  # type: ignore[union-attr]
        layers += [nn.Conv2d(int(channels), width, 3, stride, 1), nn.ReLU()]  # type: ignore[arg-type]
    return nn.Sequential(*layers).eval()


def shares(model: nn.Module, spec: LegoSpec, image: Tensor | None = IMAGE) -> tuple[float, float]:
    """Of size and of MACs, as the report of the converted network tells them."""
    made = plan(model, spec, image)
    converted = lego.convert_(copy.deepcopy(model), made)
    totals = lego.measure(converted, example_input=image).totals()
    return made.bits / made.dense_bits, totals["macs_used_only"] / totals["dense_macs"]


def lost(model: nn.Module, spec: LegoSpec, image: Tensor | None = IMAGE) -> float:
    """By the layers of the converted network."""
    converted = lego.convert_(copy.deepcopy(model), plan(model, spec, image))
    return sum(signal_lost(layer.weight_error**2) for _, layer in lego.lego_modules(converted))  # type: ignore[misc]


@pytest.mark.slow
@pytest.mark.parametrize(
    "budget", [{"max_size": 0.4}, {"max_macs": 0.7}, {"max_size": 0.5, "max_macs": 0.8}]
)
@pytest.mark.parametrize("k", [1, 2])
def test_budgets_are_kept_and_used(network: nn.Module, budget: dict[str, float], k: int) -> None:
    before = copy.deepcopy(network.state_dict())
    spec = lego.allocate(network, LegoSpec(k=k), **budget, example_input=IMAGE)
    size, macs = shares(network, spec)
    assert size <= budget.get("max_size", 1.0)
    assert macs <= budget.get("max_macs", 1.0)
    used = [found / most for found, most in ((size, budget.get("max_size")),
            (macs, budget.get("max_macs"))) if most is not None]  # fmt: skip
    assert max(used) > 0.75  # three layers leave few choices
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert spec == lego.allocate(network, LegoSpec(k=k), **budget, example_input=IMAGE)


@pytest.mark.slow
def test_within_the_same_costs_less_is_lost_than_with_one_m_for_all() -> None:
    network = lego.create(f"local-dir:{DEMO}").eval()
    uniform = LegoSpec(m=0.5, o=2)
    size, macs = shares(network, uniform, None)
    found = lego.allocate(network, uniform, max_size=size, max_macs=macs)
    kept = shares(network, found, None)
    assert all(cost <= most for cost, most in zip(kept, (size, macs), strict=True))
    assert min(kept[0] / size, kept[1] / macs) > 0.98
    assert lost(network, found, None) < 0.95 * lost(network, uniform, None)


@pytest.mark.slow
def test_without_settling_only_forms_of_known_macs_are_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Estimates alone spend 3 % too much here."""
    monkeypatch.setattr(sys.modules["legocompress.compress.budget"], "CORRECTIONS", 0)
    network = lego.create(f"local-dir:{DEMO}").eval()
    size, macs = shares(network, LegoSpec(m=0.5, o=2), None)
    found = lego.allocate(network, LegoSpec(), max_size=size, max_macs=macs)
    assert shares(network, found, None)[1] <= macs


def test_what_a_layer_loses_is_told_within_a_few_hundredths(network: nn.Module) -> None:
    """Interpolated and extrapolated errors against those of a conversion."""
    weight_errors = {}
    for m in (*SHARES, 0.375, 1.0):
        spec = LegoSpec(m=m, o=2, only=("5",), allow_expansion=True)
        converted = lego.convert_(copy.deepcopy(network), plan(network, spec, IMAGE))
        (layer,) = [layer for _, layer in lego.lego_modules(converted)]
        weight_errors[m] = layer.weight_error**2
    logs = _interpolate({round(m * 32): math.log(weight_errors[m]) for m in SHARES}, 32)
    for m in (0.375, 1.0):
        assert math.exp(logs[round(m * 32)]) == pytest.approx(weight_errors[m], abs=0.06)


def test_the_search_finds_what_trying_all_finds(network: nn.Module) -> None:
    base = plan(network, LegoSpec(m=0.125, o=1), IMAGE)
    shape = next(iter(base.layers.values())).shape
    generator = torch.Generator().manual_seed(0)
    choices = []
    for row in base.layers.values():
        made = [Form(None, 0.0, row.dense_bits, row.dense_macs or 0)]
        for part in torch.linspace(0.1, 0.9, 6).tolist():
            noise = 0.05 * float(torch.rand((), generator=generator))
            costs = (int(part * row.dense_bits), int(part * (row.dense_macs or 0)))
            made.append(Form(shape, (1 - part) ** 2 + noise, *costs))
        choices.append(made)

    def size(chosen: tuple[Form, ...]) -> float:
        saved = sum(row.dense_bits for row in base.layers.values()) - sum(c.bits for c in chosen)
        return 1 - saved / base.dense_bits

    best = min(
        sum(c.loss for c in chosen)
        for chosen in itertools.product(*choices)
        if size(chosen) <= 0.6
    )  # fmt: skip
    found = choose_forms({"max_size": 0.6}, base, choices)
    assert size(tuple(found)) <= 0.6
    assert best <= sum(c.loss for c in found) < 1.05 * best


def test_layers_keep_their_own_most_k_and_types_and_dense_ones_are_skipped(
    network: nn.Module,
) -> None:
    asked = LegoSpec(k=2, dtype="fp16", rules=("5:k=1",), skip=("1",), coefficients_dtype="bf16")
    found = lego.allocate(network, asked, max_size=0.35, example_input=IMAGE)
    assert found.coefficients_dtype == "bf16"
    rules = {rule.pattern: rule for rule in found.rules}
    assert "1" in found.skip
    assert set(rules) == {"3", "5"}
    assert (rules["3"].k, rules["5"].k) == (2, 1)
    assert {rule.dtype for rule in found.rules} == {"fp16"}
    assert all(rule.o in SPLITS for rule in found.rules)
    made: Plan = plan(network, found, IMAGE)
    assert set(made.layers) == set(rules)


@pytest.mark.slow
def test_layers_take_k_terms_or_fewer_where_that_loses_less(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = LegoSpec(k=8)
    mixed = lego.allocate(network, asked, max_size=0.3, example_input=IMAGE)
    monkeypatch.setattr(sys.modules["legocompress.compress.forms"], "TERM_DIVISORS", (1,))
    all_eight = lego.allocate(network, asked, max_size=0.3, example_input=IMAGE)
    assert {rule.k for rule in mixed.rules} == {4, 8}
    assert {rule.k for rule in all_eight.rules} == {8}
    assert shares(network, mixed)[0] <= 0.3
    assert lost(network, mixed) < 0.8 * lost(network, all_eight)


@pytest.mark.slow
def test_a_network_in_training_form_is_sized_as_deployed() -> None:
    model = create_model("repvgg_a0", pretrained=False).eval()
    image = torch.zeros(1, 3, 32, 32)
    only = LegoSpec(only=("stages.0.*", "stages.1.0.*"))
    spec = lego.allocate(model, only, max_size=0.999, max_macs=0.97, example_input=image)
    assert shares(model, spec, image)[1] <= 0.97
    assert all(rule.pattern.endswith("reparam_conv") for rule in spec.rules)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "budget", "said"),
    [
        ({}, {}, "a budget is needed"),
        ({}, {"max_size": 1.5}, "max_size=1.5 is not a share"),
        ({}, {"max_macs": 0.0}, "max_macs=0 is not a share"),
        ({}, {"max_macs": float("nan")}, "max_macs=nan is not a share"),
        ({}, {"max_size": 0.01}, "max_size=0.01 cannot be met: .* at least 0."),
        ({}, {"max_size": 1.0}, "leaves every layer dense"),
        ({"rules": ("5:m=0.5",)}, {"max_size": 0.5}, "rule '5' sets m or o"),
        ({"rules": ("5:o=2",)}, {"max_size": 0.5}, "rule '5' sets m or o"),
    ],
)
def test_what_is_refused(
    network: nn.Module, settings: dict[str, object], budget: dict[str, float], said: str
) -> None:
    with pytest.raises(SpecError, match=said):
        lego.allocate(network, LegoSpec(**settings), **budget, example_input=IMAGE)


@pytest.mark.slow
def test_the_least_that_is_named_can_be_met(network: nn.Module) -> None:
    with pytest.raises(SpecError, match="at least") as told:
        lego.allocate(network, max_macs=0.01, example_input=IMAGE)
    least = float(str(told.value).split("at least ")[1].split()[0])
    spec = lego.allocate(network, max_macs=least, example_input=IMAGE)
    assert shares(network, spec)[1] <= least


def test_networks_that_cannot_be_sized(network: nn.Module) -> None:
    with pytest.raises(PlanError, match="no layer can be converted"):
        lego.allocate(network, LegoSpec(skip=("*",)), max_size=0.5, example_input=IMAGE)
    network[1].weight.data[0] = torch.nan  # type: ignore[union-attr, index]
    with pytest.raises(ConversionError, match="NaN"):
        lego.allocate(network, max_size=0.5, example_input=IMAGE)


def test_a_layer_that_few_filters_tell_exactly(network: nn.Module) -> None:
    """Its errors are zero from some m on, which no exponential passes through."""
    with torch.no_grad():
        network[5].weight[:] = network[5].weight[:1]  # type: ignore[union-attr, index]
    spec = lego.allocate(network, max_size=0.4, example_input=IMAGE)
    rule = next(rule for rule in spec.rules if rule.pattern == "5")
    assert rule.m is not None
    assert rule.m <= 0.25


def test_macs_that_are_not_known(network: nn.Module) -> None:
    """Without a pass through the network a budget of bytes still works, one of MACs does not."""

    class Refusing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network

        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("not today")

    model = Refusing()
    with pytest.raises(PlanError, match=r"MACs could not be counted: .*not today"):
        lego.allocate(model, max_macs=0.5)
    assert lego.allocate(model, max_size=0.5).rules


def test_progress_is_told(network: nn.Module) -> None:
    told: list[tuple[int, int]] = []
    lego.allocate(
        network, max_size=0.5, example_input=IMAGE, on_layer=lambda *at: told.append(at)
    )  # fmt: skip
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_an_error_near_one_costs_more_than_one_near_none() -> None:
    assert signal_lost(0.0) == 0.0
    assert signal_lost(0.9) - signal_lost(0.8) > 3 * (signal_lost(0.2) - signal_lost(0.1))
    assert signal_lost(1.0) < float("inf")
    assert relative_error(torch.ones(2), torch.zeros(2)) == 1.0
