"""Weights from files: every form of them, and files that hold no weights."""

from __future__ import annotations

import argparse
import logging
import pickle  # a hostile file
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import legocompress as lego
from legocompress.errors import WeightsError
from legocompress.models.weights import load_weights_
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


# Training checkpoints, which hold weights beside other things


def prefixed(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {prefix + name: value for name, value in state.items()}


State = dict[str, Any]
ONE = torch.ones(1)
# The weights are those of `state`; `other` are those that must not be taken.
LAYOUTS: dict[str, tuple[Callable[[State, State], Any], str]] = {
    "torchvision": (
        lambda state, other: {
            "model": other,
            "model_ema": {"n_averaged": torch.tensor(4), **prefixed(state, "module.")},
            "args": argparse.Namespace(lr=0.1),
            "epoch": 3,
        },
        "'model_ema' of FILE, prefix 'module.' removed; averaged weights (EMA) are preferred to "
        "'model'",
    ),
    "average of no step": (
        lambda state, other: {
            "model": state,
            "model_ema": {"n_averaged": torch.tensor(0), **prefixed(other, "module.")},
        },
        "'model' of FILE",
    ),
    "timm": (
        lambda state, other: {"state_dict": other, "state_dict_ema": state, "arch": "resnet18"},
        "'state_dict_ema' of FILE; averaged weights (EMA) are preferred to 'state_dict'",
    ),
    "basicsr": (
        lambda state, other: {"params": other, "params_ema": state},
        "'params_ema' of FILE; averaged weights (EMA) are preferred to 'params'",
    ),
    "lightning": (
        lambda state, other: {"state_dict": prefixed(state, "model."), "callbacks": {}},
        "'state_dict' of FILE, prefix 'model.' removed",
    ),
    "lightning of a compiled network": (
        lambda state, other: {"state_dict": prefixed(state, "net._orig_mod.")},
        "'state_dict' of FILE, prefix 'net._orig_mod.' removed",
    ),
    "backbone alone": (
        lambda state, other: prefixed(state, "backbone."),
        "FILE, prefix 'backbone.' removed",
    ),
    "tutorial": (
        lambda state, other: {"model_state_dict": state, "loss": torch.tensor(0.1)},
        "'model_state_dict' of FILE",
    ),
    "net": (lambda state, other: {"net": state, "acc": 93.1}, "'net' of FILE"),
    "module": (lambda state, other: {"module": state}, "'module' of FILE"),
    "three deep": (
        lambda state, other: {"checkpoint": {"ema": {"module": state}}},
        "['checkpoint']['ema']['module'] of FILE",
    ),
    "thop": (
        lambda state, other: {"model": {**state, "total_ops": ONE, "layer1.total_params": ONE}},
        "'model' of FILE",
    ),
    "twice the same": (lambda state, other: {"model": state, "last": {**state}}, "'model' of FILE"),
    "bare, with an epoch": (lambda state, other: {**state, "epoch": 3}, ""),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_are_taken_out_of_training_checkpoints(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected, other = small(seed=3), small(seed=4)
    lay_out, message = LAYOUTS[name]
    torch.save(lay_out(expected.state_dict(), other.state_dict()), tmp_path / "a.pth")
    with caplog.at_level(logging.WARNING, "legocompress"):
        assert same(load_weights_(small(seed=5), tmp_path / "a.pth"), expected)
    told = [record.message.replace(str(tmp_path / "a.pth"), "FILE") for record in caplog.records]
    assert told == ([f"weights: {message}"] if message else [])


def test_a_safetensors_file_may_have_a_prefix(tmp_path: Path) -> None:
    state = small(seed=3).state_dict()
    save_file(prefixed(state, "module."), tmp_path / "a.safetensors")
    assert same(load_weights_(small(), tmp_path / "a.safetensors"), small(seed=3))


def test_optimizer_states_are_never_weights(tmp_path: Path) -> None:
    model = small(seed=3)
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.save({"optimizer": optimizer.state_dict(), "model": model.state_dict()}, tmp_path / "a")
    assert same(load_weights_(small(), tmp_path / "a"), model)
    torch.save({"optimizer": optimizer.state_dict()}, tmp_path / "b")
    with pytest.raises(WeightsError, match=r"holds 'optimizer' \(dict of 2 others\)"):
        load_weights_(small(), tmp_path / "b")


def test_half_of_the_names_with_a_prefix_do_not_fit(tmp_path: Path) -> None:
    state = small().state_dict()
    mixed = {f"module.{k}" if k.startswith("layer") else k: v for k, v in state.items()}
    torch.save({"model": mixed}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"missing \(such as layer1.*unknown \(such as module"):
        load_weights_(small(), tmp_path / "a.pth")


def test_a_misfit_names_the_nearest_and_what_the_file_holds(tmp_path: Path) -> None:
    six = small(num_classes=6).state_dict()
    start = small().state_dict()
    less = {name: value for name, value in six.items() if not name.startswith("layer")}
    content = {"net": six, "ema": prefixed(less, "module."), "epoch": 3, "log": {"loss": [1.0]}}
    torch.save(content, tmp_path / "a.pth")
    model = small()
    with pytest.raises(WeightsError) as caught:
        load_weights_(model, tmp_path / "a.pth")
    text = str(caught.value)
    assert "the weights 'net' in " in text
    assert "2 of another shape (such as fc.weight: (6, 16) given, (5, 16) expected)" in text
    assert re.search(r"Neither do 'ema' \(without the prefix 'module.'\): \d+ missing", text)
    assert text.endswith(
        f"The file holds 'net' (OrderedDict of {len(six)} tensors), 'ema' (dict of {len(less)} "
        "tensors), 'epoch' (int), 'log' (dict of 1 others)"
    )
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())


def test_several_networks_in_a_file_are_not_guessed(tmp_path: Path) -> None:
    states = {"student": small(seed=3).state_dict(), "teacher": small(seed=4).state_dict()}
    torch.save(states, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"several state dicts that fit: 'student', 'teacher'"):
        load_weights_(small(), tmp_path / "a.pth")


def test_objects_beside_the_weights_are_refused_with_what_to_do(tmp_path: Path) -> None:
    state = small(seed=3).state_dict()
    path = tmp_path / "a.pth"
    torch.save({"state_dict": state, "cfg": argparse.Namespace(x=Payload())}, path)
    with pytest.raises(WeightsError, match=r"such as .*Payload\), which is not allowed") as caught:
        load_weights_(small(), path)
    line = re.search(r"save its state dict alone: (torch\.save\(.*?\)), with", str(caught.value))
    assert line is not None
    assert line[1] == (
        f"torch.save(torch.load({str(path)!r}, weights_only=False)['state_dict'], 'weights.pth')"
    )
    # What the error advises works.
    torch.save(torch.load(path, weights_only=False)["state_dict"], tmp_path / "weights.pth")
    assert same(load_weights_(small(), tmp_path / "weights.pth"), small(seed=3))


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
