"""Random networks compute the same converted, deployed, reloaded and exported."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import legocompress as lego
from benchmarks.coverage import collect_tensors
from tests.support.random_networks import RandomNetwork, random_network

SHARDS, PER_SHARD = 12, 5
EXPORTED = 6  # networks; an export takes longer than all the rest


def images(seed: int) -> Tensor:
    rng = random.Random(seed)
    size = rng.randint(8, 12), rng.randint(8, 12)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rng.choice([1, 2]), 3, *size, generator=generator)


def convert(network: RandomNetwork, seed: int, x: Tensor) -> RandomNetwork:
    rng = random.Random(seed)
    spec = lego.LegoSpec(
        m=rng.choice([0.25, 0.5, 1.0]),
        o=rng.choice([1, 2]),
        k=rng.choice([1, 1, 2]),
        coefficients=rng.random() < 0.8,
        linear=True,  # the head always converts
        allow_expansion=True,
    )
    return lego.convert_(network, lego.plan(network, spec, x))


def check_same(expected: Any, actual: Any, limit: float, what: str) -> None:
    """Outputs of one structure whose tensors agree, relative to the largest value of each."""
    if isinstance(expected, dict):
        assert expected.keys() == actual.keys(), what
    pairs = zip(collect_tensors(expected), collect_tensors(actual), strict=True)
    for a, b in pairs:
        assert a.shape == b.shape, what
        gap = float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp(min=1e-9))
        assert gap <= limit, f"{what}: {gap:.1e}"


@torch.no_grad()
def check_network(seed: int, folder: Path) -> None:
    x = images(seed)
    model = convert(random_network(seed), seed, x)
    model.double()
    twin = random_network(seed).double()
    twin.load_state_dict(lego.to_dense(model).state_dict())
    exact = twin(x.double())
    check_same(exact, model(x.double()), 1e-11, f"{seed}: converted")
    for _, layer in lego.lego_modules(model):
        layer.route = layer.routes()[-1]
    check_same(exact, model(x.double()), 1e-11, f"{seed}: by the reference route")
    for _, layer in lego.lego_modules(model):
        layer.route = "assemble"
    model.float()
    twin.float()
    expected, others = twin(x), twin(2 * x.flip(0))
    loaded = lego.load(lego.save(model, folder / str(seed)), model=random_network(seed))
    check_same(model(x), loaded(x), 0, f"{seed}: reloaded")
    for network, what in ((model, "deployed"), (twin, "dense, deployed")):
        lego.deploy_(network, x, seconds=0)
        notes = lego.lego_state(network).deployment.notes
        assert not any("runs by its own code" in note for note in notes), f"{seed}: {notes}"
        check_same(expected, network(x), 1e-4, f"{seed}: {what}")
        check_same(others, network(2 * x.flip(0)), 1e-4, f"{seed}: {what}, again")


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_random_networks_compute_the_same(
    shard: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pick(forms: dict[str, Any], *_: Any, **__: Any) -> dict[str, list[float]]:
        """Call a random form the fastest, in place of timing."""
        for form in forms.values():
            form()
        return {name: [rng.random()] for name in forms}

    rng = random.Random(shard)
    monkeypatch.setattr("legocompress.deploy.autotune.time_interleaved", pick)
    for number in range(PER_SHARD):
        check_network(PER_SHARD * shard + number, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(EXPORTED))
def test_random_networks_are_exported(seed: int, tmp_path: Path) -> None:
    x = images(seed)
    model = random_network(seed, output=("tensor", "tuple", "dict")[seed % 3])
    model.looks_at_values = False
    convert(model, seed, x)
    lego.export_program(model, tmp_path / "x.pt2", example_input=x[:1])
    with torch.no_grad():
        actual = torch.export.load(tmp_path / "x.pt2").module()(torch.cat([x, x]))
        check_same(model(torch.cat([x, x])), actual, 3e-3, f"{seed}: exported")
