"""A new classifier: everything else stays, and the folder rebuilds it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import legocompress as lego
from legocompress.errors import UsageError
from tests.support.tiny import compressed


def test_a_new_classifier_is_all_that_changes(tmp_path: Path) -> None:
    model = compressed()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lego.reset_classifier_(model, 7)
    for name, value in model.state_dict().items():
        assert name.startswith("fc.") or torch.equal(value, before[name])
    x = torch.randn(2, 1, 16, 16)
    assert model.eval()(x).shape == (2, 7)
    lego.save(model, tmp_path / "net")
    again = lego.load(tmp_path / "net")
    torch.testing.assert_close(again(x), model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_conv_classifier_of_torchvision(tmp_path: Path) -> None:
    model = lego.create("torchvision/squeezenet1_1", pretrained=False)
    lego.convert_(model, lego.plan(model))
    lego.reset_classifier_(model, 9)
    lego.save(model, tmp_path / "net")
    assert lego.load(tmp_path / "net")(torch.randn(1, 3, 64, 64)).shape == (1, 9)


def test_a_lego_classifier_is_refused() -> None:
    model = compressed(linear=True)
    with pytest.raises(UsageError, match=r"'fc' is a Lego module.*--skip"):
        lego.reset_classifier_(model, 7)


def test_a_network_of_ones_own_is_refused() -> None:
    with pytest.raises(UsageError, match="in Python"):
        lego.reset_classifier_(nn.Sequential(nn.Conv2d(1, 1, 1)), 7)
