"""The rivals of the calibration benchmark: what they cost, and that they meet their budget."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.rivals import costs, low_rank, palette, repair

pytestmark = pytest.mark.slow

NAMES = ["1", "3"]
N_STATE = 18 * 8 + 4 * 8 + 8 * 10 + 10  # of the stem, of its norm's floats and of the classifier
COUNTER = 8  # bytes: how many batches the norm has seen


@pytest.fixture
def network() -> nn.Module:
    layers = [
        nn.Sequential(nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(12, 8, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    ]
    model = nn.Sequential(*layers).eval()
    model.pretrained_cfg = {"input_size": (2, 10, 10)}  # type: ignore[assignment]
    return model


def test_costs_of_a_dense_network(network: nn.Module) -> None:
    assert costs.count_stored_bytes(network) == 4 * (N_STATE + 864 + 96) + COUNTER
    assert costs.count_macs(network) == 8 * 8 * 18 * 8 + 4 * 4 * (864 + 96) + 80


def test_costs_of_a_factorised_network(network: nn.Module) -> None:
    found = repair.SHRINKS["svd"][""](network, NAMES, 0.5).network
    first, last = int(0.5 * 12 * 72 / 84), int(0.5 * 8 * 12 / 20)  # ranks
    size = first * (72 + 12) + last * (12 + 8)
    assert costs.count_stored_bytes(found) == 4 * (N_STATE + size) + COUNTER
    assert costs.count_macs(found) == 8 * 8 * 18 * 8 + 4 * 4 * size + 80


@pytest.mark.slow
def test_costs_of_a_palette(network: nn.Module) -> None:
    pytest.importorskip("sklearn")
    found = palette.palettise(network, NAMES, 0)
    assert costs.count_stored_bytes(found) == 4 * N_STATE + COUNTER + (864 + 96) // 2 + 2 * 16 * 4
    assert costs.count_macs(found) == costs.count_macs(network)
    assert len(found.get_submodule("1").weight.unique()) == 16  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["svd", "tucker", "pruning"])
@pytest.mark.parametrize("kind", ["bytes", "macs"])
def test_rivals_meet_their_budget(network: nn.Module, method: str, kind: str) -> None:
    pytest.importorskip(repair.PACKAGES.get(method, "torch"))
    before = copy.deepcopy(network.state_dict())
    # What the largest ratio within the budget leaves over is less than a layer's smallest step.
    budget = 0.7 * costs.COSTS[kind](network)
    images = torch.randn(20, 2, 10, 10)
    found, facts = repair.compress(
        method, network, NAMES, images, (kind, budget), repair.Repair(0, 0)
    )
    assert 0.75 * budget < facts[kind] <= budget
    assert facts[kind] == costs.COSTS[kind](found)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("method", ["svd", "tucker"])
def test_a_factorised_layer_is_one_kernel(network: nn.Module, method: str) -> None:
    pytest.importorskip(repair.PACKAGES.get(method, "torch"))
    conv = network.get_submodule("1")
    chain = {"svd": low_rank.make_svd, "tucker": low_rank.make_tucker}[method](conv, 0.8)
    kernel = low_rank.merge_kernels([part.weight for part in chain])  # type: ignore[misc]
    x = torch.randn(3, 8, 7, 7)
    whole = torch.conv2d(x, kernel, stride=2, padding=1)
    assert torch.allclose(chain(x), whole, atol=1e-5)


def test_repair_brings_the_output_nearer(network: nn.Module) -> None:
    images = torch.randn(60, 2, 10, 10)
    budget = ("macs", 0.6 * costs.count_macs(network))
    errors = [
        repair.compress("svd", network, NAMES, images, budget, repair.Repair(epochs, 0))[1][
            "held_out_error"
        ]
        for epochs in (0, 5)
    ]
    assert errors[1] < errors[0]


def test_bisection_finds_the_edge() -> None:
    assert costs.find_largest_ratio(lambda r: 100 * r, 37) == pytest.approx(0.37, abs=1e-3)
    assert costs.find_largest_ratio(lambda r: 100 * r, 37) <= 0.37
    with pytest.raises(ValueError, match="no ratio"):
        costs.find_largest_ratio(lambda r: 1.0, 0.5)


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_errors_of_factorised_layers_are_those_of_their_kernels(
    network: nn.Module, share: float
) -> None:
    conv = network.get_submodule("1")
    assert isinstance(conv, nn.Conv2d)
    weight = conv.weight.detach().double()
    chain = low_rank.make_svd(conv, share)
    u, s, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    rank = chain[0].out_channels
    lost = (u[:, :rank] * s[:rank] @ vh[:rank] - weight.flatten(1)).square().sum()
    assert low_rank.measure_svd_error(conv, chain) == pytest.approx(
        float(lost / weight.square().sum())
    )
    chain = low_rank.make_tucker(conv, share)
    inner, outer = chain[1].in_channels, chain[1].out_channels
    left = torch.linalg.svd(weight.flatten(1)).U[:, :outer]
    right = torch.linalg.svd(weight.transpose(0, 1).flatten(1)).U[:, :inner]
    near = torch.einsum("na,ma,mchw,cb,db->ndhw", left, left, weight, right, right)
    lost = (near - weight).square().sum()
    assert low_rank.measure_tucker_error(conv, chain) == pytest.approx(
        float(lost / weight.square().sum())
    )


def count_macs_at(make: Callable[..., Any], network: nn.Module, ratio: float) -> int:
    return costs.count_macs(make(network, NAMES, ratio).network)


def test_shares_by_layer_lose_less_at_the_same_cost(network: nn.Module) -> None:
    with torch.no_grad():  # one layer is of rank one, the other of full rank
        conv = network.get_submodule("1")
        conv.weight.copy_(conv.weight[:1] * torch.arange(1.0, 13.0).reshape(-1, 1, 1, 1))
    lost = {}
    for variant, make in repair.SHRINKS["svd"].items():
        ratio = costs.find_largest_ratio(partial(count_macs_at, make, network), 12_000)
        found = make(network, NAMES, ratio).network
        assert costs.count_macs(found) <= 12_000
        kept = [found.get_submodule(name) for name in NAMES]
        lost[variant] = sum(
            low_rank.measure_svd_error(network.get_submodule(name), part)  # type: ignore[misc]
            for name, part in zip(NAMES, kept, strict=True)
            if isinstance(part, nn.Sequential)
        )
    assert lost["by layer, MACs"] < 0.5 * lost[""]
