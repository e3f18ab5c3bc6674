"""Which layers share a bank, how large it is, and that its bits count once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import legocompress as lego
from legocompress.compress.convert import list_banks
from legocompress.errors import ConversionError, SpecError
from legocompress.lego.module import lego_banks
from legocompress.lego.surgery import share_bank_
from tests.support.folders import SMALL
from tests.support.lego_layers import conv, lego_

IMAGE = torch.zeros(1, 3, 32, 32)


def network() -> nn.Module:
    torch.manual_seed(0)
    return lego.create("resnet18", pretrained=False, model_args=SMALL).eval()


def banks_of(model: nn.Module, **settings: Any) -> dict[str, list[str]]:
    plan = lego.plan(model, lego.LegoSpec(allow_expansion=True, **settings), IMAGE)
    return {bank: [row.name for row in rows] for bank, rows in list_banks(plan).items()}


def test_without_sharing_no_layer_has_a_shared_bank() -> None:
    assert banks_of(network()) == {}


def test_a_stage_shares_among_layers_of_one_resolution_and_kernel() -> None:
    assert banks_of(network(), share="stage") == {
        f"layer{i}.0.conv1": [f"layer{i}.0.conv1", f"layer{i}.0.conv2"] for i in (1, 2, 3, 4)
    }


def test_a_network_shares_among_all_layers_of_one_kernel() -> None:
    banks = banks_of(network(), share="network")
    assert banks["layer1.0.conv1"] == [f"layer{i}.0.conv{j}" for i in (1, 2, 3, 4) for j in (1, 2)]
    assert banks["layer1.0.downsample.0"] == [f"layer{i}.0.downsample.0" for i in (1, 2, 3, 4)]
    assert len(banks) == 2


def test_layers_are_cut_to_the_narrowest_fragment_and_pool_their_filters() -> None:
    plan = lego.plan(network(), lego.LegoSpec(m=0.5, o=2, share="network"), IMAGE)
    rows = list_banks(plan)["layer1.0.conv1"]
    shapes = {row.name: row.shape for row in rows if row.shape is not None}
    assert {shape.width for shape in shapes.values()} == {4}
    assert shapes["layer4.0.conv2"].n_split == 4
    assert {shape.n_lego for shape in shapes.values()} == {
        sum(s.n_out for s in shapes.values()) // 2
    }


def test_a_width_that_does_not_fit_leaves_a_layer_in_another_bank() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 20, 3), nn.Conv2d(20, 8, 3))
    plan = lego.plan(model, lego.LegoSpec(m=1, o=1, share="network", allow_expansion=True), IMAGE)
    assert [row.bank for row in plan.rows] == [None, None, None]  # 20 channels in fragments of 8
    assert [row.shape.width for row in plan.layers.values() if row.shape] == [8, 20]


def test_what_a_rule_leaves_out_keeps_its_own_bank() -> None:
    banks = banks_of(network(), share="network", rules=("layer4.*:share=layer",))
    assert banks["layer1.0.conv1"][-1] == "layer3.0.conv2"
    banks = banks_of(network(), share="network", rules=("layer4.*:dtype=fp16",))
    assert banks["layer4.0.conv1"] == ["layer4.0.conv1", "layer4.0.conv2"]


def test_frozen_layers_share_no_bank_with_layers_that_train() -> None:
    model = network()
    model.get_submodule("layer1").requires_grad_(False)
    assert "layer2.0.conv1" in banks_of(model, share="network")


def test_a_group_that_does_not_pay_stays_dense() -> None:
    plan = lego.plan(network(), lego.LegoSpec(m=1, o=8, k=8, share="network"), IMAGE)
    assert "no saving" in plan.skipped["layer1.0.downsample.0"]  # one term per weight and more
    assert "layer1.0.conv1" in plan.layers
    assert plan.bits <= plan.dense_bits


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_the_bits_of_a_bank_count_once_in_plan_and_report(dtype: str) -> None:
    model = network()
    spec = lego.LegoSpec(m=0.5, o=2, k=2, share="stage", dtype=dtype, allow_expansion=True)
    plan = lego.plan(model, spec, IMAGE)
    rows = list_banks(plan)["layer1.0.conv1"]
    bank, slots = rows[0].shape, sum(row.shape.n_slots for row in rows if row.shape)
    assert bank is not None
    filter_bits = {"fp32": 32 * 4 * 9, "int8": 8 * 4 * 9 + 16}[dtype]
    assert sum(row.bits for row in rows) == 8 * filter_bits + slots * (3 + 16)
    lego.convert_(model, plan)
    totals = lego.measure(model, example_input=IMAGE).totals()
    assert totals["bits"] == plan.bits
    assert totals["params"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("settings", [{}, {"k": 3}, {"coefficients": False}, {"dtype": "int8"}])
def test_shared_units_compute_as_their_dense_weights(settings: dict[str, Any]) -> None:
    model = network()
    spec = lego.LegoSpec(m=0.5, o=2, share="network", **settings, allow_expansion=True)
    lego.convert_(model, lego.plan(model, spec, IMAGE))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(lego.to_dense(model)(x), model(x))
    assert all((m.weight_error or 0) < 0.9 for _, m in lego.lego_modules(model))


def test_layers_of_small_weights_are_met_as_well_as_those_of_large_ones() -> None:
    model = network()
    with torch.no_grad():
        model.get_submodule("layer2.0.conv1").weight.mul_(1e-3)
    spec = lego.LegoSpec(m=0.5, o=2, k=2, share="network", allow_expansion=True)
    errors = {n: m.weight_error or 0 for n, m in lego.lego_modules(
        lego.convert_(model, lego.plan(model, spec, IMAGE)))}  # fmt: skip
    assert errors["layer2.0.conv1"] < 1.1 * errors["layer2.0.conv2"]


def shared(**settings: Any) -> nn.Module:
    model = network()
    spec = lego.LegoSpec(m=0.5, o=2, share="network", allow_expansion=True, **settings)
    return lego.convert_(model, lego.plan(model, spec, IMAGE))


def test_an_optimiser_and_a_copy_see_the_bank_once() -> None:
    model = copy.deepcopy(shared())
    bank = next(group for group in lego_banks(model) if len(group) == 8)
    filters = bank[0][1].lego_filters
    assert sum(p is filters for p in model.parameters()) == 1
    before = filters.detach().clone()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    optimiser.step()
    assert all(module.lego_filters is filters for _, module in bank)
    torch.testing.assert_close(filters, before - 0.1 * filters.grad)


@pytest.mark.parametrize("change", ["dense", "delete"])
def test_a_member_that_goes_leaves_the_others_as_they_are(change: str, tmp_path: Any) -> None:
    model = shared(k=2)
    weights = {name: module.weight.clone() for name, module in lego.lego_modules(model)}
    block: Any = model.get_submodule("layer1.0")
    if change == "dense":
        lego.to_dense_(block.conv1)
    else:
        block.conv1 = nn.Conv2d(64, 8, 3, padding=1, bias=False)
    assert len(list(lego.lego_modules(model))) == len(weights) - 1
    for name, module in lego.lego_modules(model):
        assert torch.equal(module.weight, weights[name])
    lego.save(model, tmp_path / "a")  # another layer stores the bank now
    for name, module in lego.lego_modules(lego.load(tmp_path / "a")):
        assert torch.equal(module.weight, weights[name])


def test_a_budget_chooses_the_largest_bank_that_fits() -> None:
    spec = lego.LegoSpec(o=4, k=1, share="network")
    found = lego.allocate(network(), spec, max_size=0.75, example_input=IMAGE)
    assert found == spec.model_copy(update={"m": found.m})
    dense = lego.plan(network(), found, IMAGE).dense_bits
    more = spec.model_copy(update={"m": found.m * 1.1})
    used = [lego.plan(network(), s, IMAGE).bits / dense for s in (found, more)]
    assert used[0] <= 0.75 < used[1]
    with pytest.raises(SpecError, match=r"max_size=0.5 cannot be met.*smaller o or k"):
        lego.allocate(network(), spec, max_size=0.5, example_input=IMAGE)


def test_conversion_and_casts_keep_one_bank() -> None:
    model = shared().double().to(memory_format=torch.channels_last).half()
    assert sorted(len(group) for group in lego_banks(model))[-1] == 8


def test_banks_that_differ_are_not_tied() -> None:
    with pytest.raises(ConversionError, match="agree in shape"):
        share_bank_([lego_(conv(4, 4, 3)), lego_(conv(4, 4, 1))])
