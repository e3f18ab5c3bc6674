"""Weights from files: every form of them, and what is none."""

from __future__ import annotations

import pickle  # a hostile file
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import legocompress as lego
from legocompress.errors import WeightsError
from tests.support.tiny import same, small


def test_weights_files_of_every_form(tmp_path: Path) -> None:
    model = small(seed=3)
    state = model.state_dict()
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pth")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3},
               tmp_path / "wrapped.pth.tar")  # fmt: skip
    torch.save({"model": state}, tmp_path / "model.pth")
    fewer = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    save_file(fewer, tmp_path / "fewer.safetensors")
    for name in ("a.safetensors", "a.pth", "wrapped.pth.tar", "model.pth", "fewer.safetensors"):
        loaded: Any = small(weights=tmp_path / name, pretrained=True)
        assert same(loaded, model), name
        assert lego.lego_state(loaded).source.weights == f"file {name}"


def test_half_weights_are_widened(tmp_path: Path) -> None:
    state = {k: v.half() if v.is_floating_point() else v for k, v in small().state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    loaded = small(weights=tmp_path / "a.safetensors", seed=5).state_dict()
    assert loaded["fc.weight"].dtype == torch.float32
    assert torch.equal(loaded["fc.weight"], state["fc.weight"].float())


def test_weights_of_another_network_are_told_with_examples(tmp_path: Path) -> None:
    save_file(small(num_classes=6).state_dict(), tmp_path / "six.safetensors")
    with pytest.raises(
        WeightsError,
        match=r"2 of another shape \(such as fc.weight: \(6, 16\) given, \(5, 16\) exp",
    ):
        small(weights=tmp_path / "six.safetensors")
    other = lego.create("torchvision/squeezenet1_1", pretrained=False)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(
        WeightsError, match=r"missing \(such as conv1.weight\).*unknown \(such as c"
    ):
        small(weights=tmp_path / "other.safetensors")
    state = small().state_dict()
    save_file({**state, "extra": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(WeightsError, match=r"1 unknown \(such as extra\)"):
        small(weights=tmp_path / "more.safetensors")


class Payload:
    """What a hostile pickle would build."""


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="does not exist"):
        small(weights=tmp_path / "nowhere.pth")
    with pytest.raises(WeightsError, match="does not exist"):
        small(weights=tmp_path)
    state = small().state_dict()
    save_file(state, tmp_path / "whole.safetensors")
    torch.save(state, tmp_path / "whole.pth")
    for kind in ("safetensors", "pth"):
        raw = (tmp_path / f"whole.{kind}").read_bytes()
        for length in (0, 7, 100, len(raw) // 2, len(raw) - 1):
            (tmp_path / f"cut.{kind}").write_bytes(raw[:length])
            with pytest.raises(WeightsError, match=rf"cut.{kind}'"):
                small(weights=tmp_path / f"cut.{kind}")
    torch.save(Payload(), tmp_path / "object.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload()))
    for name in ("object.pth", "plain.pth"):
        with pytest.raises(WeightsError, match="plain tensors"):
            small(weights=tmp_path / name)
    for number, value in enumerate([torch.zeros(3), [1, 2], {"a": 1}, 5, {}, {"state_dict": 5}]):
        torch.save(value, tmp_path / f"{number}.pth")
        with pytest.raises(WeightsError):
            small(weights=tmp_path / f"{number}.pth")


def test_convnext_is_made_of_convs_and_takes_the_weights_of_its_linear_form(tmp_path: Path) -> None:
    original = timm.create_model("convnext_atto", pretrained=False, num_classes=4).eval()
    for parameter in original.parameters():
        if parameter.dim() == 1:  # norms, biases and layer scales start as constants
            nn.init.normal_(parameter, 0.5, 0.3)
    torch.save(original.state_dict(), tmp_path / "linear.pth")
    model: Any = lego.create("convnext_atto", weights=tmp_path / "linear.pth", num_classes=4)
    assert lego.lego_state(model).source.model_args["conv_mlp"] is True
    assert isinstance(model.stages[0].blocks[0].mlp.fc1, nn.Conv2d)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = original(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1
