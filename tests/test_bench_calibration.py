"""The rivals of the calibration benchmark: what they cost, and that they meet their budget."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import rivals
import shrink

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
    assert rivals.stored_bytes(network) == 4 * (N_STATE + 864 + 96) + COUNTER
    assert rivals.macs(network) == 8 * 8 * 18 * 8 + 4 * 4 * (864 + 96) + 80


def test_costs_of_a_factorised_network(network: nn.Module) -> None:
    found = shrink.SHRINKS["svd"][""](network, NAMES, 0.5).network
    first, last = int(0.5 * 12 * 72 / 84), int(0.5 * 8 * 12 / 20)  # ranks
    size = first * (72 + 12) + last * (12 + 8)
    assert rivals.stored_bytes(found) == 4 * (N_STATE + size) + COUNTER
    assert rivals.macs(found) == 8 * 8 * 18 * 8 + 4 * 4 * size + 80


@pytest.mark.slow
def test_costs_of_a_palette(network: nn.Module) -> None:
    pytest.importorskip("sklearn")
    found = shrink.palettised(network, NAMES, 0)
    assert rivals.stored_bytes(found) == 4 * N_STATE + COUNTER + (864 + 96) // 2 + 2 * 16 * 4
    assert rivals.macs(found) == rivals.macs(network)
    assert len(found.get_submodule("1").weight.unique()) == 16  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["svd", "tucker", "pruning"])
@pytest.mark.parametrize("kind", ["bytes", "macs"])
def test_rivals_meet_their_budget(network: nn.Module, method: str, kind: str) -> None:
    pytest.importorskip(rivals.PACKAGES.get(method, "torch"))
    before = copy.deepcopy(network.state_dict())
    # What the largest ratio within the budget leaves over is less than a layer's smallest step.
    budget = 0.7 * rivals.COSTS[kind](network)
    images = torch.randn(20, 2, 10, 10)
    found, facts = rivals.compress(method, network, NAMES, images, (kind, budget), 0, 0)
    assert 0.75 * budget < facts[kind] <= budget
    assert facts[kind] == rivals.COSTS[kind](found)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("method", ["svd", "tucker"])
def test_a_factorised_layer_is_one_kernel(network: nn.Module, method: str) -> None:
    pytest.importorskip(rivals.PACKAGES.get(method, "torch"))
    conv = network.get_submodule("1")
    chain = {"svd": shrink.svd_form, "tucker": shrink.tucker_form}[method](conv, 0.8)
    kernel = shrink.merged([part.weight for part in chain])
    x = torch.randn(3, 8, 7, 7)
    whole = torch.conv2d(x, kernel, stride=2, padding=1)
    assert torch.allclose(chain(x), whole, atol=1e-5)


def test_repair_brings_the_output_nearer(network: nn.Module) -> None:
    images = torch.randn(60, 2, 10, 10)
    budget = ("macs", 0.6 * rivals.macs(network))
    errors = [
        rivals.compress("svd", network, NAMES, images, budget, epochs, 0)[1]["held_out_error"]
        for epochs in (0, 5)
    ]
    assert errors[1] < errors[0]


def test_bisection_finds_the_edge() -> None:
    assert rivals.largest_ratio(lambda r: 100 * r, 37) == pytest.approx(0.37, abs=1e-3)
    assert rivals.largest_ratio(lambda r: 100 * r, 37) <= 0.37
    with pytest.raises(ValueError, match="no ratio"):
        rivals.largest_ratio(lambda r: 1.0, 0.5)


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_errors_of_factorised_layers_are_those_of_their_kernels(
    network: nn.Module, share: float
) -> None:
    conv = network.get_submodule("1")
    assert isinstance(conv, nn.Conv2d)
    weight = conv.weight.detach().double()
    chain = shrink.svd_form(conv, share)
    u, s, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    rank = chain[0].out_channels
    lost = (u[:, :rank] * s[:rank] @ vh[:rank] - weight.flatten(1)).square().sum()
    assert shrink.svd_error(conv, chain) == pytest.approx(float(lost / weight.square().sum()))
    chain = shrink.tucker_form(conv, share)
    inner, outer = chain[1].in_channels, chain[1].out_channels
    left = torch.linalg.svd(weight.flatten(1)).U[:, :outer]
    right = torch.linalg.svd(weight.transpose(0, 1).flatten(1)).U[:, :inner]
    near = torch.einsum("na,ma,mchw,cb,db->ndhw", left, left, weight, right, right)
    lost = (near - weight).square().sum()
    assert shrink.tucker_error(conv, chain) == pytest.approx(float(lost / weight.square().sum()))


def test_shares_by_layer_lose_less_at_the_same_cost(network: nn.Module) -> None:
    with torch.no_grad():  # one layer is of rank one, the other of full rank
        conv = network.get_submodule("1")
        conv.weight.copy_(conv.weight[:1] * torch.arange(1.0, 13.0).reshape(-1, 1, 1, 1))
    lost = {}
    for variant, make in shrink.SHRINKS["svd"].items():
        ratio = rivals.largest_ratio(
            lambda r, make=make: rivals.macs(make(network, NAMES, r).network), 12_000
        )
        found = make(network, NAMES, ratio).network
        assert rivals.macs(found) <= 12_000
        kept = [found.get_submodule(name) for name in NAMES]
        lost[variant] = sum(
            shrink.svd_error(network.get_submodule(name), part)
            for name, part in zip(NAMES, kept, strict=True)
            if isinstance(part, nn.Sequential)
        )
    assert lost["by layer, MACs"] < 0.5 * lost[""]
