"""Choices of routes are replayed, kept as a hint, and refused where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import legocompress as lego
from legocompress.errors import CheckpointError, DeployError
from tests.support.deploying import X, converted, deployed, relative


def test_choices_are_replayed_to_the_bit() -> None:
    model, _ = deployed()
    choices = lego.lego_state(model).deployment.choices
    assert lego.lego_state(model).deployment.milliseconds.keys() == choices.routes.keys()
    with torch.no_grad():
        expected = model(X)
        lego.deploy_(model, X, choices=choices)
        assert torch.equal(model(X), expected)
    assert lego.lego_state(model).deployment.choices == choices
    assert lego.lego_state(model).deployment.milliseconds == {}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"routes": {}}, "'stem'"),
        ({"formats": {}}, "no format"),
        ({"routes": {"stem": "plain"}}, "'plain'"),
        ({"routes": {"stem": "reference"}}, "possible"),
    ],
)
def test_choices_of_another_network_are_refused(change: dict[str, Any], word: str) -> None:
    model, expected = deployed()
    choices = lego.lego_state(model).deployment.choices
    if change.get("routes"):
        change = {"routes": {**choices.routes, **change["routes"]}}
    with pytest.raises(DeployError, match=word):
        lego.deploy_(model, X, choices=choices.model_copy(update=change))
    with torch.no_grad():
        assert relative(expected, model(X)) < 1e-6


def hinted(tmp_path: Path) -> Path:
    model = lego.create(
        "resnet18",
        pretrained=False,
        num_classes=10,
        model_args={"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]},
    )
    image = torch.randn(1, 3, 32, 32)
    converted(model, image)
    lego.deploy_(model, image, seconds=0)
    return lego.save(model, tmp_path / "hinted")


@pytest.mark.slow
def test_the_checkpoint_keeps_the_choices_as_a_hint(tmp_path: Path) -> None:
    folder = hinted(tmp_path)
    model = lego.load(folder)
    image = torch.randn(1, 3, 32, 32)
    (choices,) = lego.lego_state(model).choices
    lego.deploy_(model, image)
    assert lego.lego_state(model).deployment.hint_used
    assert lego.lego_state(model).deployment.choices == choices
    lego.deploy_(model, image, seconds=0, remeasure=True)
    assert not lego.lego_state(model).deployment.hint_used
    lego.deploy_(model, torch.randn(2, 3, 32, 32), seconds=0)  # another batch
    assert not lego.lego_state(model).deployment.hint_used
    shapes = [hint.machine.input_shapes[0] for hint in lego.lego_state(model).choices]
    assert shapes == [(1, 3, 32, 32), (2, 3, 32, 32)]
    lego.save(model, tmp_path / "again")
    assert lego.lego_state(lego.load(tmp_path / "again")).choices == lego.lego_state(model).choices


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"routes": {"conv1": "magic"}},
        {"routes": {"conv1": 3}},
        {"formats": {"": "sideways"}},
        {"machine": None},
        {"unknown": 1},
    ],
)
def test_a_hint_that_is_none_is_a_typed_error(change: dict[str, Any], tmp_path: Path) -> None:
    folder = hinted(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["compression_config"]["deployment"][0].update(change)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="deployment"):
        lego.load(folder)


def test_a_hint_of_another_network_is_not_used(tmp_path: Path) -> None:
    folder = hinted(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["compression_config"]["deployment"][0]["routes"] = {"nowhere": "fused"}
    (folder / "config.json").write_text(json.dumps(config))
    model = lego.deploy_(lego.load(folder), torch.randn(1, 3, 32, 32), seconds=0)
    assert not lego.lego_state(model).deployment.hint_used
    assert "conv1" in lego.lego_state(model).deployment.choices.routes
