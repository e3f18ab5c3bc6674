"""A deployed quantised network: the kernels give the bits of the emulation."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import legocompress as lego
from legocompress import kernels
from legocompress.deploy.recorded import RecordedRun
from legocompress.quantize.forward import CompiledForward
from tests.quantize.test_quantization import Untraceable
from tests.support.quantizing import small_images, small_network
from tests.support.random_networks import random_network

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no compiled kernels here")


@pytest.fixture(scope="module")
def images() -> Tensor:
    return small_images()


def both(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs of a quantised network and of its deployed form, which must be compiled."""
    with torch.no_grad():
        emulated = model(images)
        lego.deploy_(model, images[:1])
        return emulated, model(images)


@pytest.mark.parametrize("convert", [True, False])
def test_the_deployed_network_gives_the_same_bits(convert: bool, images: Tensor) -> None:
    model = lego.quantize_(small_network(convert=convert), images)
    emulated, deployed = both(model, images)
    assert torch.equal(emulated, deployed)
    forward = model.__dict__["forward"]
    assert isinstance(forward, CompiledForward)
    record = lego.lego_state(model).deployment
    assert record is not None
    assert record.precision == "int8"
    assert record.notes == ()
    assert record.n_layers == 8
    assert record.n_lego == len(list(lego.lego_modules(model))) == (4 if convert else 0)
    assert record.n_sums == 1
    recorded: Any = forward.run_compiled
    runs = [m for m in recorded.__self__.modules() if isinstance(m, RecordedRun)]
    assert len(runs) == 1  # the whole network is one call
    with torch.no_grad():  # replayed, and at other sizes
        assert torch.equal(model(images), emulated)
        other = torch.randn(2, 3, 18, 14)
        assert torch.equal(model(other), lego.undeploy_(model)(other))


def test_undeploy_gives_the_emulation_back(images: Tensor) -> None:
    model = lego.quantize_(small_network(), images)
    emulation = model.__dict__["forward"]
    lego.deploy_(model, images[:1])
    assert model.__dict__["forward"] is not emulation
    lego.undeploy_(model)
    assert model.__dict__["forward"] is emulation


def test_a_changed_weight_is_noticed(images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    model = lego.quantize_(small_network(), images)
    lego.deploy_(model, images[:1])
    with torch.no_grad():
        model.get_submodule("head").bias.add_(1)  # type: ignore[operator, union-attr]
        with caplog.at_level(logging.WARNING, "legocompress"):
            assert torch.equal(model(images), type(model).forward(model, images))
    assert "changed since quantize_ (head.bias)" in caplog.text


def test_a_copy_of_a_deployed_network_runs_the_emulation(images: Tensor) -> None:
    model = lego.quantize_(small_network(), images)
    lego.deploy_(model, images[:1])
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(images), model(images))


def test_the_parts_of_a_network_are_deployed(images: Tensor) -> None:
    torch.manual_seed(0)
    model = lego.quantize_(Untraceable().eval(), images)
    emulated, deployed = both(model, images)
    assert torch.equal(emulated, deployed)
    assert isinstance(model.first.__dict__["forward"], CompiledForward)


@pytest.mark.parametrize("seed", range(12))
def test_random_networks_give_the_same_bits(seed: int) -> None:
    images = small_images(10)
    model = random_network(seed, output="tensor")
    try:
        with torch.no_grad():
            model(images)
    except RuntimeError:
        pytest.skip("a map of this network is too small to be padded")
    lego.quantize_(model, images)
    emulated, deployed = both(model, images)
    assert torch.equal(emulated, deployed)
    record = lego.lego_state(model).deployment
    assert record is not None
    assert not [note for note in record.notes if "emulation" in note]
