"""Which layers stay dense, and why: stems, classifiers, and kinds that are not supported."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import CondConv2d, StdConv2d
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations

from legocompress.compress.convert import convert_
from legocompress.compress.planning import plan
from legocompress.lego.module import lego_modules
from legocompress.lego.surgery import to_dense_
from legocompress.spec import LegoSpec
from tests.support.planning import (
    assert_sums_to,
    assert_untouched,
    net,
    row,
    small,
    snapshot,
)
from tests.support.small_cnn import IMAGE as WIDE_IMAGE
from tests.support.small_cnn import small_cnn


def test_the_stem_is_the_first_conv_that_runs() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Conv2d(16, 8, 1)
            self.middle = nn.Conv2d(16, 16, 3, padding=1)
            self.first = nn.Conv2d(3, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.middle(self.first(x)))

    made = small(Reversed())
    assert [r.name for r in made.rows] == ["first", "middle", "last"]
    assert made.skipped == {"first": "stem: it sees the image"}


def test_every_conv_that_sees_the_image_is_a_stem() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(6, 16, 3, padding=1)
            self.b = nn.Conv2d(6, 16, 1)
            self.c = nn.Conv2d(16, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x) + self.b(x))

    made = small(Branches(), image=torch.zeros(1, 6, 8, 8))
    assert made.skipped.keys() == {"a", "b"}
    assert all(reason.startswith("stem") for reason in made.skipped.values())


def test_the_configuration_names_stem_and_classifier() -> None:
    model: Any = net(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 10, 1))
    model.pretrained_cfg = {"first_conv": ("0", "1"), "classifier": "3"}
    made = small(model)
    assert made.skipped == {
        "0": "stem: it sees the image",
        "1": "stem: it sees the image",
        "3": "classifier",
    }


def test_a_conv_classifier_by_torchvisions_naming_stays_dense() -> None:
    class Squeeze(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = net(nn.Conv2d(16, 16, 1))
            self.classifier = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 10, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.features(x))

    made = small(Squeeze())
    assert made.skipped == {
        "features.0": "stem: it sees the image",
        "classifier.2": "classifier",
    }


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = CondConv2d(16, 8, 3, padding=1, num_experts=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x, torch.full((x.shape[0], 4), 0.25))


class Reshaped(nn.Module):
    """Runs a layer for another number of axes inside a network of images."""

    def __init__(self, layer: nn.Module, *size: int) -> None:
        super().__init__()
        self.layer, self.size = layer, size

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(x.shape[0], *self.size))


@pytest.mark.parametrize(
    ("make", "name", "reason", "macs"),
    [
        (lambda: nn.Conv2d(16, 16, 3, groups=16), "1", "depthwise", 16 * 9 * 36),
        (lambda: nn.Conv2d(16, 32, 3, groups=16), "1", "depthwise", 32 * 9 * 36),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(1024, 8)),
            "1.1",
            "Linear layer (--linear takes it in)",
            8192,
        ),
        (
            lambda: nn.ConvTranspose2d(16, 8, 2, stride=2),
            "1",
            "ConvTranspose2d is not supported",
            16 * 8 * 4 * 64,
        ),
        (
            lambda: Reshaped(nn.Conv1d(16, 8, 3), 16, 64),
            "1.layer",
            "Conv1d is not supported",
            16 * 8 * 3 * 62,
        ),
        (
            lambda: Reshaped(nn.Conv3d(4, 8, 1), 4, 4, 8, 8),
            "1.layer",
            "Conv3d is not supported",
            4 * 8 * 256,
        ),
        (Routed, "1.mix", "CondConv2d is not supported", 16 * 8 * 9 * 64),
        (
            lambda: parametrizations.weight_norm(nn.Conv2d(16, 8, 3)),
            "1",
            "its weight is computed",
            16 * 8 * 9 * 36,
        ),
    ],
    ids=["depthwise", "multiplier", "linear", "up", "1d", "3d", "cond", "weight-norm"],
)
def test_what_cannot_be_converted_says_why_and_still_costs(
    make: Callable[[], nn.Module], name: str, reason: str, macs: int
) -> None:
    model = net(make())
    made = small(model, only=["*"])
    assert made.skipped[name].startswith(reason)
    assert not row(made, name).converted
    assert row(made, name).dense_macs == row(made, name).macs == macs
    assert_sums_to(made, model)


@pytest.mark.parametrize("exact", [True, False])
def test_a_depthwise_conv_stays_dense_even_where_it_is_named(exact: bool) -> None:
    made = small(net(nn.Conv2d(16, 16, 3, groups=16)), only=["1"] if exact else ["*"])
    assert made.skipped["1"].startswith("depthwise")


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: nn.LazyConv2d(8, 3), "2"),
        (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(8)), "2.1"),
    ],
    ids=["conv", "linear"],
)
def test_a_lazy_layer_is_left_lazy_and_says_so(make: Callable[[], nn.Module], name: str) -> None:
    model = net(nn.Conv2d(16, 16, 3), make())
    made = small(model)
    assert "lazy" in made.skipped[name]
    assert made.layers.keys() == {"1"}
    assert any(is_lazy(p) for p in model.parameters())


def quantization() -> Any:
    return pytest.importorskip("torch.ao.quantization")


def test_layers_of_quantisation_aware_training_stay_as_they_are() -> None:
    config = quantization().get_default_qat_qconfig()
    model = net(torch.ao.nn.qat.Conv2d(16, 8, 3, qconfig=config), nn.Conv2d(8, 8, 3))
    before = snapshot(model)
    made = small(model)
    assert made.skipped["1"] == "part of a quantised model"
    assert made.layers.keys() == {"2"}
    assert_untouched(model, before)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_layers_of_a_quantised_model_stay_dense() -> None:
    quantization()
    model = net(torch.ao.nn.quantized.Conv2d(16, 8, 3), nn.Conv2d(8, 8, 3))
    assert small(model, image=None).skipped["1"] == "part of a quantised model"


def test_a_subclass_of_conv_is_converted() -> None:
    made = small(net(StdConv2d(16, 8, 3)))
    assert made.layers["1"].type_name == "StdConv2d"


class Spectral(nn.Module):
    """Two real convs, then a complex one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.body = nn.Conv2d(8, 16, 3)
        self.waves = nn.Conv2d(16, 16, 3, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        return self.waves(self.body(self.stem(x)).to(torch.complex64)).abs()


def test_a_complex_layer_stays_dense_and_the_others_convert() -> None:
    model = Spectral()
    made = plan(model, LegoSpec(), WIDE_IMAGE)
    assert made.skipped["waves"] == "complex weights are not supported"
    convert_(model, made)
    assert [name for name, _ in lego_modules(model)] == ["body"]
    dense = to_dense_(copy.deepcopy(model))
    assert torch.equal(model(WIDE_IMAGE + 1), dense(WIDE_IMAGE + 1))


class Tagged(Tensor):
    """A tensor subclass, as quantised weights are."""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda weight: weight.to(torch.int8), "int8 weights are not supported"),
        (
            lambda weight: weight.to(torch.float8_e4m3fn),
            "float8_e4m3fn weights are not supported",
        ),
        (lambda weight: weight.to_sparse(), "sparse_coo weights are not supported"),
        (
            lambda weight: weight.as_subclass(Tagged),
            "its weight is a Tagged, not a plain parameter",
        ),
    ],
    ids=["int8", "float8", "sparse", "subclass"],
)
def test_weights_of_other_kinds_stay_dense(change: Callable[[Tensor], Tensor], reason: str) -> None:
    model = small_cnn()
    model[6].weight = nn.Parameter(change(model[6].weight.detach()), requires_grad=False)
    model.forward = lambda x: x  # type: ignore[method-assign, assignment]  # it could not run
    made = plan(model, LegoSpec(), WIDE_IMAGE)
    assert made.skipped["6"] == reason
    convert_(model, made)
    assert [name for name, _ in lego_modules(model)] == ["3", "7", "10"]
