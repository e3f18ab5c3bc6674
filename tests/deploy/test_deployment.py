"""Deployed networks compute what they did before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import legocompress as lego
from benchmarks.coverage import make_source
from legocompress import kernels
from legocompress.models.factory import build
from tests.support.deploying import (
    Block,
    X,
    check,
    conv,
    converted,
    deployed,
    relative,
    runs_by_graph,
)

pytestmark = pytest.mark.slow


def test_who_listens_hears_the_same() -> None:
    model = converted(Block(), X)
    heard: list[Tensor] = []
    for layer in (model.conv1, model.norm2):
        layer.register_forward_hook(lambda module, args, output: heard.append(output.clone()))
    with torch.no_grad():
        model(X)
    expected = heard[:]
    found = check(model, X)
    heard.clear()
    with torch.no_grad():
        model(X)
    assert len(heard) == len(expected) == 2
    assert relative(expected, heard) < 1e-5
    assert (found.n_norms, found.n_sums) == (1, 1)  # of the one conv that nobody listens to


def test_a_hooked_root_and_a_bare_conv() -> None:
    model = converted(Block(), X)
    seen: list[Any] = []
    model.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    check(model, X)
    assert set(seen) == {Tensor}
    layer = converted(nn.Sequential(conv(3, 8), conv(8, 8)), X)[1]
    x = torch.randn(2, 8, 9, 9)
    layer.register_forward_hook(lambda module, args, output: output + 1)
    assert check(layer, x).choices.routes.keys() == {""}


def test_deploying_again_starts_afresh() -> None:
    model, _ = deployed()
    with torch.no_grad():
        model.conv1.lego_filters.mul_(2)
        expected = lego.to_dense(model)(X)
        lego.deploy_(model, X, seconds=0)
        assert runs_by_graph(model)
        assert relative(expected, model(X)) < 1e-5


def test_missing_kernels_are_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr(kernels, "available", lambda: False)
    monkeypatch.setattr(kernels, "why_unavailable", lambda: "there was no compiler")
    for _ in range(2):
        check(converted(Block(), torch.randn(1, 3, 9, 11)), torch.randn(1, 3, 9, 11))
    assert [record.message for record in caplog.records] == [
        "deploy_ goes on without the fused kernel, slower: there was no compiler"
    ]


EXACT = {"m": 2.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "n_lego", "n_norms"),
    [
        ("timm/resnet18", 19, 20),
        ("timm/regnety_002", 69, 44),
        ("timm/tf_mobilenetv3_small_075", 41, 34),
        ("timm/nf_regnet_b0", 30, 0),
        ("torchvision/googlenet", 56, 57),
        ("torchvision/mnasnet0_5", 34, 52),
    ],
)
def test_networks_compute_the_same(name: str, n_lego: int, n_norms: int) -> None:
    model = build(make_source(name))
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = converted(model, x, **EXACT)(x)
        lego.deploy_(model, x, seconds=0)
        assert relative(expected, model(x)) < 1e-4
    done = lego.lego_state(model).deployment
    assert done.n_lego >= n_lego
    assert done.n_norms == n_norms
