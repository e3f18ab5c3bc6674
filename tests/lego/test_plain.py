"""A layer with a computation of its own runs by its own code, everywhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import Conv2dSame, StdConv2d
from torch import Tensor, nn

import legocompress as lego
from legocompress.deploy.conv_layer import is_deployable_conv
from legocompress.lego.module import computes_plainly
from tests.support.custom_convs import CUSTOM_CONVS, NamedConv, ShiftedLinear

SPEC = lego.LegoSpec(m=0.5, o=2, linear=True, allow_expansion=True)


def network(make: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), make(), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 1),
    ).double().eval()  # fmt: skip


def convert(model: Any) -> Any:
    x = torch.zeros(1, 3, 6, 7, dtype=torch.float64)
    return lego.convert_(model, lego.plan(model, SPEC, x))


def dense_twin(model: Any, make: Callable[[], nn.Module]) -> Any:
    """The dense network, built anew, with the assembled weights."""
    twin = network(make)
    twin.load_state_dict(lego.to_dense(model).state_dict())
    return twin


X = torch.randn(2, 3, 6, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("make", CUSTOM_CONVS.values(), ids=CUSTOM_CONVS)
@torch.no_grad()
def test_a_lego_layer_runs_the_code_of_its_class_and_instance(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model = convert(network(make))
    expected = dense_twin(model, make)(X)
    assert (expected - network(lambda: nn.Conv2d(6, 8, 3, padding=1))(X)).abs().max() > 1e-3
    torch.testing.assert_close(model(X), expected)
    layer = model[2]
    assert layer.routes() == ("assemble",)
    assert model[5].routes() == ("assemble", "reference")
    assert not computes_plainly(layer)
    assert not is_deployable_conv(layer, allow_hooks=True)
    loaded = lego.load(lego.save(model, tmp_path / "saved"), model=network(make))
    torch.testing.assert_close(loaded(X), model(X))
    lego.deploy_(model, X, seconds=0)
    assert lego.lego_state(model).deployment.choices.routes.keys() == {"0", "5"}
    notes = lego.lego_state(model).deployment.notes
    assert all("LegoScaledCallConv has a __call__ of its own" in note for note in notes)
    torch.testing.assert_close(model(X), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv forward", "weight"])
def test_an_export_runs_the_code_of_the_class(name: str, tmp_path: Path) -> None:
    model = convert(network(CUSTOM_CONVS[name])).float()
    x = X[:1].float()
    lego.export_program(model, tmp_path / "x.pt2", example_input=x)
    with torch.no_grad():
        expected = dense_twin(model, CUSTOM_CONVS[name]).float()(x)
    actual = torch.export.load(tmp_path / "x.pt2").module()(x)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)  # of rounded coefficients


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv forward", "weight", "instance conv forward"])
def test_calibration_repairs_what_the_class_computes(name: str) -> None:
    original = network(CUSTOM_CONVS[name])
    model = convert(copy.deepcopy(original)).float()
    original.float()
    images = torch.randn(16, 3, 6, 7)
    with torch.no_grad():
        before = (model(images) - original(images)).norm()
        lego.calibrate_(model, original, images)
        assert (model(images) - original(images)).norm() < 0.95 * before


@torch.no_grad()
def test_a_linear_with_a_computation_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(6, 8), ShiftedLinear(8, 8)).double()
    lego.convert_(model, lego.plan(model, SPEC, X[0, 0, :, :6]))
    x = torch.randn(3, 6, dtype=torch.float64)
    layer: Any = model[1]
    assert layer.routes() == ("assemble",)
    hidden = model[0](x)
    torch.testing.assert_close(model(x), hidden @ layer.weight.T + layer.bias + 0.5)


@pytest.mark.parametrize("kind", [nn.Conv2d, Conv2dSame, NamedConv])
def test_a_subclass_that_only_adds_methods_keeps_every_route(kind: type[nn.Conv2d]) -> None:
    layer: Any = kind(6, 8, 3)
    assert computes_plainly(layer)
    assert is_deployable_conv(layer)
    model = convert(network(lambda: kind(6, 8, 3)))
    assert model[2].routes() == ("assemble", "reference")


class Halved(torch.Tensor):
    """A weight that is half of what it holds wherever it is used."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        plain = [a.as_subclass(Tensor) if isinstance(a, cls) else a for a in args]
        if func is torch.conv2d:
            plain[1] = plain[1] / 2
        return func(*plain, **(kwargs or {}))


@torch.no_grad()
def test_a_tensor_subclass_as_weight_is_left_to_its_own_code() -> None:
    model = network(lambda: nn.Conv2d(6, 8, 3, padding=1))
    model[2]._parameters["weight"] = model[2].weight.data.as_subclass(Halved)
    expected = model(X)
    assert not computes_plainly(model[2])
    assert lego.plan(model, SPEC, X).skipped["2"] == "its weight is a Halved, not a plain parameter"
    lego.deploy_(model, X, seconds=0)
    assert lego.lego_state(model).deployment.choices.routes.keys() == {"0", "5"}
    torch.testing.assert_close(model(X), expected)


def test_what_else_is_not_plain() -> None:
    assert not computes_plainly(nn.ReLU())
    assert not computes_plainly(nn.Conv1d(3, 4, 1))
    assert not computes_plainly(StdConv2d(3, 4, 1))
    parametrised = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))
    assert not computes_plainly(parametrised)
