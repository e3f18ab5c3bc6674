"""Deployed networks compute what they did, as wholes and in parts, until something changes."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import legocompress as lego
from benchmarks.coverage import make_source
from legocompress import kernels
from legocompress.errors import UsageError
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


class Stubborn(nn.Module):
    """Does not trace as a whole, since it looks at its values; its parts do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), nn.Sequential(conv(16, 16), nn.BatchNorm2d(16))
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        x = self.first(x)
        if x.sum() > -1e9:
            x = self.norm(self.second(x)) + x
        return self.second(x) if twice else x


def test_what_does_not_trace_is_deployed_in_parts() -> None:
    model = converted(Stubborn(), X)
    with torch.no_grad():
        expected = model(X), model(X, twice=True)
        lego.deploy_(model, X, seconds=0)
        assert relative(expected, (model(X), model(X, twice=True))) < 1e-5
    found = model.lego_deployment
    assert (found.n_layers, found.n_norms) == (5, 4)
    assert found.choices.formats.keys() == {"first", "second"}
    assert "(root) is not traced as a whole: TraceError" in found.notes[0]


def test_training_and_gradients_go_through_the_own_code() -> None:
    model, _ = deployed()
    assert runs_by_graph(model)
    model.train()
    model(X).sum().backward()
    assert model.conv1.lego_filters.grad.abs().max() > 0
    model.eval()
    assert not runs_by_graph(model)  # the norms' statistics have moved
    model, expected = deployed()
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad.abs().max() > 0
    assert relative(expected, model(X)) < 1e-5


@pytest.mark.parametrize("change", ["load", "step", "double", "autocast", "dense"])
def test_a_change_is_seen(change: str) -> None:
    model, expected = deployed()
    x = X
    with torch.no_grad():
        if change == "load":
            other = {name: value.clone() for name, value in model.state_dict().items()}
            other["conv1.lego_filters"] *= 2
            model.load_state_dict(other)
        elif change == "step":
            model.conv1.lego_filters.mul_(2)
        elif change == "double":
            model.double()
            x = X.double()
        elif change == "dense":
            lego.to_dense_(model)
            assert "forward" not in model.__dict__
        if change in ("load", "step"):
            assert not runs_by_graph(model)
            assert relative(expected, model(X)) > 1e-3
            assert torch.equal(model(X), lego.undeploy_(model)(X))
        elif change == "autocast":
            with torch.autocast("cpu"):
                assert not runs_by_graph(model)
        else:
            assert relative(expected.to(x.dtype), model(x)) < 1e-5


@pytest.mark.slow
def test_copies_exports_and_undeploying() -> None:
    model, expected = deployed()
    twin = copy.deepcopy(model)
    assert not runs_by_graph(twin) if "forward" in twin.__dict__ else True
    with torch.no_grad():
        assert relative(expected, twin(X)) < 1e-6
        assert relative(expected, lego.to_dense(model)(X)) < 1e-6
        exported = torch.export.export(model, (X,)).module()
        assert relative(expected, exported(X)) < 1e-6
        assert list(inspect.signature(model.forward).parameters) == ["x"]
        lego.undeploy_(model)
        assert "forward" not in model.__dict__
        assert torch.equal(model(X), twin(X))


def test_a_hook_that_comes_later_is_heard() -> None:
    model, expected = deployed()
    heard: list[Tensor] = []
    with model.norm1.register_forward_hook(lambda module, args, output: heard.append(output)):
        with torch.no_grad():
            assert relative(expected, model(X)) < 1e-6
        assert len(heard) == 1
    assert runs_by_graph(model)
    totals = lego.measure(model, example_input=X).totals()
    assert totals["dense_macs"] > totals["macs"] > 0


def test_deploying_again_starts_afresh() -> None:
    model, _ = deployed()
    with torch.no_grad():
        model.conv1.lego_filters.mul_(2)
        expected = lego.to_dense(model)(X)
        lego.deploy_(model, X, seconds=0)
        assert runs_by_graph(model)
        assert relative(expected, model(X)) < 1e-5


@pytest.mark.parametrize("example", ["image", torch.zeros(1, 3, 8, 8).int(), ()])
def test_an_example_that_is_no_image(example: Any) -> None:
    with pytest.raises(UsageError, match="example_input"):
        lego.deploy_(converted(Block(), X), example)


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
    done = model.lego_deployment
    assert done.n_lego >= n_lego
    assert done.n_norms == n_norms


@pytest.mark.slow
def test_a_detector_is_deployed_in_parts() -> None:
    model = build(make_source("torchvision/ssdlite320_mobilenet_v3_large"))
    images = [torch.rand(3, 320, 320)]
    with torch.no_grad():
        converted(model, (images,), **EXACT)
        features = model.backbone(images[0][None])
        outputs = model.head(list(features.values()))
        lego.deploy_(model, (images,), seconds=0)
        assert relative(features, model.backbone(images[0][None])) < 1e-4
        assert relative(outputs, model.head(list(features.values()))) < 1e-4
        assert len(model(images)) == 1
    done = model.lego_deployment
    assert "backbone" in done.choices.formats
    assert done.n_lego > 60
    assert done.notes[0].startswith("(root) is not traced as a whole")
