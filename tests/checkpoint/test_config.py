"""The config: what timm reads of it, and what of a network it keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import legocompress as lego
from legocompress.checkpoint import FORMAT_VERSION
from legocompress.errors import (
    CheckpointError,
)
from legocompress.state.conversion import ConversionRecord
from legocompress.state.source import Source
from tests.support.folders import CONFIG, SMALL, Mixed, assert_same, mixed, randomised, small


def test_what_made_the_network_survives(tmp_path: Path) -> None:
    model: Any = small(k=2, dtype="bf16", rules=["layer1.*:m=0.5"], skip=["layer4.0.conv2"])
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "crop_pct": 0.7}
    loaded: Any = lego.load(lego.save(model, tmp_path / "a"))
    assert isinstance(lego.lego_state(loaded).conversion, ConversionRecord)
    assert lego.lego_state(loaded).conversion == lego.lego_state(model).conversion
    assert lego.lego_state(loaded).conversion.skipped["layer4.0.conv2"] == "skipped by name"
    assert lego.lego_state(loaded).source == lego.lego_state(model).source
    assert lego.lego_state(loaded).source == Source(
        "timm", "resnet18", {**SMALL, "num_classes": 10}, "random, seed 0"
    )
    for key, value in model.pretrained_cfg.items():
        # A null and the place that the weights came from are left out, as timm does.
        if value is not None and key in ("input_size", "mean", "std", "crop_pct", "interpolation"):
            assert loaded.pretrained_cfg[key] == value, key
    assert loaded.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    assert not loaded.training


def test_the_config_is_one_that_timm_reads(tmp_path: Path) -> None:
    lego.save(small(), tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert config["architecture"] == "resnet18"
    assert config["num_classes"] == 10
    assert config["model_args"] == {**SMALL, "num_classes": 10}
    assert config["pretrained_cfg"]["input_size"] == [3, 224, 224]
    block = config["compression_config"]
    assert block["format_version"] == 1 < FORMAT_VERSION  # 2: quantised, or shared banks
    assert block["spec"]["m"] == 0.7
    unit = block["layers"]["layer1.0.conv2"]
    assert (unit["n_lego"], unit["n_split"], unit["n_terms"]) == (6, 2, 1)


def test_a_network_made_by_timm_alone_is_rebuilt(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", pretrained=False, num_classes=3, **SMALL)
    spec = lego.LegoSpec(m=2, o=2, allow_expansion=True)
    lego.convert_(randomised(model), lego.plan(model, spec, torch.zeros(1, 3, 32, 32)))
    try:
        lego.save(model, tmp_path / "a")
    except CheckpointError as error:  # what timm does not note cannot be rebuilt, and it says so
        assert "create it with legocompress.create" in str(error)  # noqa: PT017
        assert not (tmp_path / "a").exists()
    else:
        assert_same(model, lego.load(tmp_path / "a"), torch.randn(2, 3, 32, 32))


def test_a_classifier_that_was_reset_is_rebuilt(tmp_path: Path) -> None:
    model = lego.create("test_resnet", pretrained=False)
    lego.convert_(model, lego.plan(model, lego.LegoSpec(m=1, o=2)))
    model.reset_classifier(3)
    lego.save(model, tmp_path / "a")
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(lego.load(tmp_path / "a")(x), model(x))


@pytest.mark.slow
def test_a_network_from_a_folder_is_rebuilt_with_its_classes(tmp_path: Path) -> None:
    own = timm.create_model("convnext_atto", num_classes=7)
    timm.models.save_for_hf(own, tmp_path / "hub", safe_serialization=True)
    model = lego.create(f"local-dir:{tmp_path / 'hub'}")
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(model(x), own.eval()(x), rtol=1e-4, atol=1e-5)
    lego.convert_(model, lego.plan(model))
    lego.save(model, tmp_path / "a")
    assert torch.equal(lego.load(tmp_path / "a")(x), model(x))


def test_an_own_class_needs_an_instance(tmp_path: Path) -> None:
    model = mixed()
    lego.save(model, tmp_path / "a")
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["architecture"] is None
    with pytest.raises(CheckpointError, match=r"load\(path, model=\.\.\.\)"):
        lego.load(tmp_path / "a")
    instance = Mixed()
    assert lego.load(tmp_path / "a", model=instance) is instance
    with pytest.raises(CheckpointError, match="no conv or Linear called 'wide'"):
        lego.load(tmp_path / "a", model=nn.Sequential(nn.Conv2d(3, 8, 3)))
    with pytest.raises(CheckpointError, match="no conv or Linear called 'wide'"):
        lego.load(tmp_path / "a", model=instance)  # converted already
