"""quantize_: what it computes, what it refuses, and when the network computes in fp32 again."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import legocompress as lego
from legocompress.errors import DataError, QuantizationError, UsageError
from legocompress.quantize.operators import IntegerOperator
from tests.support.quantizing import SIDE, small_images, small_network
from tests.support.random_networks import random_network


@pytest.fixture(scope="module")
def images() -> Tensor:
    return small_images()


@pytest.fixture(scope="module")
def quantised(images: Tensor) -> nn.Module:
    return lego.quantize_(small_network(), images)


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("convert", [True, False])
def test_a_quantised_network_computes_nearly_as_in_fp32(convert: bool, images: Tensor) -> None:
    model = small_network(convert=convert)
    reference = copy.deepcopy(model)
    assert lego.quantize_(model, images) is model
    new = small_images(8, seed=2)
    with torch.no_grad():
        expected, actual = reference(new), model(new)
    assert 0 < relative_error(expected, actual) < 0.06
    record = lego.lego_state(model).quantization
    assert record is not None
    assert record.images == 16
    assert record.error < 0.06
    assert record.notes == ()
    assert record.float_layers == {}
    assert ("a" in record.dense_layers) == (not convert)
    assert {"stem", "depthwise", "head"} <= set(record.dense_layers)


def test_every_operator_of_the_small_network_is_an_integer_one(
    quantised: nn.Module, images: Tensor
) -> None:
    with torch.no_grad():
        quantised(images[:1])
    graph: Any = quantised.__dict__["forward"].graph
    kinds = {type(m).__name__ for m in graph.modules() if isinstance(m, IntegerOperator)}
    assert kinds == {
        "QuantizeMap", "IntegerConvLayer", "IntegerPool", "IntegerGate", "IntegerCat",
        "IntegerMean", "IntegerAdd", "IntegerLinearLayer",
    }  # fmt: skip
    called = [node for node in graph.graph.nodes if node.op != "call_module"]
    assert {node.op for node in called} == {"placeholder", "output"}


def test_the_fp32_network_behind_it_holds_the_rounded_weights(
    quantised: nn.Module, images: Tensor
) -> None:
    with torch.no_grad():
        own = type(quantised).forward(quantised, images)
        emulated = quantised(images)
    assert 0 < relative_error(own, emulated) < 0.05
    for name in ("stem", "head"):
        weight = quantised.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        rows = weight.detach().flatten(1).double()
        steps = rows / (rows.abs().amax(1, keepdim=True) / 127)
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)


def test_other_sizes_and_batches_run(quantised: nn.Module) -> None:
    with torch.no_grad():
        y = quantised(torch.randn(3, 3, 20, 16))
        parts = torch.cat([quantised(x[None]) for x in small_images(3)])
        together = quantised(small_images(3))
    assert y.shape == (3, 5)
    assert torch.equal(parts, together)


def test_a_copy_computes_the_same_bits(quantised: nn.Module, images: Tensor) -> None:
    twin = copy.deepcopy(quantised)
    with torch.no_grad():
        assert torch.equal(quantised(images), twin(images))
    assert twin.__dict__["forward"].graph is not quantised.__dict__["forward"].graph


def test_a_changed_network_computes_in_fp32_and_says_so(
    images: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = lego.quantize_(small_network(), images)
    with torch.no_grad():
        model(images)
        model.get_submodule("stem").weight.add_(0.1)  # type: ignore[operator, union-attr]
        with caplog.at_level(logging.WARNING, "legocompress"):
            assert torch.equal(model(images), type(model).forward(model, images))
        assert "changed since quantize_ (stem.weight)" in caplog.text
        changed = copy.deepcopy(model)  # a copy finds out at its first call
        assert torch.equal(changed(images), type(model).forward(changed, images))


def test_with_gradients_or_in_train_mode_it_computes_in_fp32(
    quantised: nn.Module, images: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.enable_grad(), caplog.at_level(logging.WARNING, "legocompress"):
        y = quantised(images)
    assert y.requires_grad
    assert "gradients enabled, so it computes in fp32" in caplog.text


def test_unquantize_gives_the_fp32_network_back(images: Tensor) -> None:
    model = lego.quantize_(small_network(), images)
    assert lego.unquantize_(model) is model
    assert lego.lego_state(model).quantization is None
    with torch.no_grad():
        assert torch.equal(model(images), type(model).forward(model, images))


def test_the_same_images_give_the_same_integers(images: Tensor) -> None:
    one, two = (lego.quantize_(small_network(), images) for _ in range(2))
    assert lego.lego_state(one).quantization == lego.lego_state(two).quantization
    with torch.no_grad():
        assert torch.equal(one(images), two(images))


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        (torch.randn(9, 3, SIDE, SIDE), DataError, "9 images are too few.*10 or more"),
        (torch.zeros(0, 3, SIDE, SIDE), DataError, "0 images are too few"),
        (torch.full((10, 3, SIDE, SIDE), 0.5), DataError, "all pixels.*equal"),
        (torch.full((10, 3, SIDE, SIDE), float("nan")), DataError, "not finite"),
        (torch.zeros(10, 3, SIDE, SIDE).double(), DataError, "one float32 tensor.*float64"),
        ([1, 2], DataError, "one float32 tensor.*not list"),
    ],
)
def test_unfit_images_are_refused_before_anything_changes(
    images: Any, error: type[Exception], words: str
) -> None:
    model = small_network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=words):
        lego.quantize_(model, images)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert "forward" not in model.__dict__


def test_other_precisions_dtypes_and_second_times_are_refused(images: Tensor) -> None:
    model = small_network()
    with pytest.raises(UsageError, match="precision='int4': there is int8"):
        lego.quantize_(model, images, "int4")
    with pytest.raises(UsageError, match=r"float32 on the CPU.*stem\.weight.*float64"):
        lego.quantize_(small_network().double(), images)
    lego.quantize_(model, images)
    with pytest.raises(QuantizationError, match="quantised already"):
        lego.quantize_(model, images)


def test_a_map_that_is_not_finite_is_named(images: Tensor) -> None:
    model = small_network()
    with torch.no_grad():
        model.get_submodule("depthwise").weight.fill_(float("inf"))  # type: ignore[operator, union-attr]
    with pytest.raises(DataError, match=r"the map 'depthwise.*not finite"):
        lego.quantize_(model, images)


def test_a_network_without_a_traceable_conv_is_refused(images: Tensor) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 4)).eval()
    with pytest.raises(QuantizationError, match="no part of this network"):
        lego.quantize_(model, images)


class Untraceable(nn.Module):
    """Looks at values, so only its parts trace."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if y.sum() > 1e9:
            y = y / 2
        return torch.as_tensor(self.second(y))


def test_a_network_that_does_not_trace_is_quantised_in_parts(images: Tensor) -> None:
    torch.manual_seed(0)
    model = Untraceable().eval()
    reference = copy.deepcopy(model)
    lego.quantize_(model, images)
    record = lego.lego_state(model).quantization
    assert record is not None
    assert set(record.parts) == {"first", "second"}
    assert "(root) is not traced as a whole" in record.notes[0]
    with torch.no_grad():
        assert 0 < relative_error(reference(images), model(images)) < 0.05


@pytest.mark.parametrize("seed", range(12))
def test_random_networks_of_any_structure(seed: int) -> None:
    model = random_network(seed, output="tensor")
    images = small_images(10)
    reference = copy.deepcopy(model)
    try:
        with torch.no_grad():
            expected = reference(images)
    except RuntimeError:
        pytest.skip("a map of this network is too small to be padded")
    lego.quantize_(model, images)
    record = lego.lego_state(model).quantization
    assert record is not None
    with torch.no_grad():
        actual = model(images)
        assert torch.equal(actual, copy.deepcopy(model)(images))
    assert record.error < 0.3
    assert relative_error(expected, actual) < 0.3
