"""A network that does not trace as a whole is deployed in parts."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import legocompress as lego
from benchmarks.coverage import make_source
from legocompress.errors import UsageError
from legocompress.models.factory import build
from legocompress.models.outputs import flatten_leaves, list_container_types
from tests.support.deploying import Block, X, conv, converted, relative
from tests.support.structures import ModelOutput, Pair, Result, Structured, TwoInputs

EXACT = {"m": 2.0}


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
    found = lego.lego_state(model).deployment
    assert (found.n_layers, found.n_norms) == (5, 4)
    assert found.choices.formats.keys() == {"first", "second"}
    assert "(root) is not traced as a whole: TraceError" in found.notes[0]


@pytest.mark.parametrize("example", ["image", torch.zeros(1, 3, 8, 8).int(), ()])
def test_an_example_that_is_no_image(example: Any) -> None:
    with pytest.raises(UsageError, match="example_input"):
        lego.deploy_(converted(Block(), X), example)


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
    done = lego.lego_state(model).deployment
    assert "backbone" in done.choices.formats
    assert done.n_lego > 60
    assert done.notes[0].startswith("(root) is not traced as a whole")


def test_examples_by_name_and_of_two_inputs() -> None:
    model = TwoInputs().eval()
    pair = (torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8))
    with torch.no_grad():
        expected = model(*pair)
        lego.deploy_(model, {"y": pair[1], "x": pair[0]}, seconds=0)
        assert relative(expected, model(*pair)) < 1e-5
        assert relative(expected, model(x=pair[0], y=pair[1])) < 1e-5
    assert lego.lego_state(model).deployment.notes == ()
    with pytest.raises(UsageError, match=r"example_input does not fit.*'y'"):
        lego.deploy_(model, pair[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda maps, logits: Result(maps, {"logits": logits, "n": 3, "none": None}),
        lambda maps, logits: ModelOutput(logits=logits, maps=(maps,)),
        lambda maps, logits: OrderedDict(out=maps, aux=None),
        lambda maps, logits: Pair([maps, "name"], logits),
    ],
)
def test_a_deployed_network_returns_the_same_type(make: Any) -> None:
    model, x = Structured(make).eval(), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
        lego.deploy_(model, x, seconds=0)
        actual = model(x)
    assert lego.lego_state(model).deployment.notes == ()
    assert list_container_types(actual) == list_container_types(expected)
    pairs = zip(flatten_leaves(expected), flatten_leaves(actual), strict=True)
    for (path, a), (other, b) in pairs:
        assert path == other
        assert relative(a, b) < 1e-5 if isinstance(a, Tensor) else a == b


class Secret(nn.Conv2d):
    """Returns another string when it is traced."""

    def forward(self, x: Any) -> Any:
        return super().forward(x), "traced" if isinstance(x, fx.Proxy) else "run"


def test_values_that_are_not_tensors_are_compared() -> None:
    model, x = nn.Sequential(Secret(3, 8, 3)).eval(), torch.randn(1, 3, 8, 8)
    lego.deploy_(model, x, seconds=0)
    assert model(x)[1] == "run"
