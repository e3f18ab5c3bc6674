"""A network that does not trace as a whole is deployed in parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import legocompress as lego
from benchmarks.coverage import make_source
from legocompress.errors import UsageError
from legocompress.models.factory import build
from tests.support.deploying import Block, X, conv, converted, relative

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
