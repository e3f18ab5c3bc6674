"""The probing pass: it leaves no trace, finds an input by itself, and counts positions."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from legocompress.models.probe import default_input, evaluating, model_cfg, probe


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def flags(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.frozen = nn.BatchNorm2d(4).eval()

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        self.frozen(self.conv(x))
        raise ValueError("no")


def test_modes_and_hooks_are_restored_after_an_exception() -> None:
    model = Fails()
    before = flags(model)
    assert before == [True, True, False]
    with pytest.raises(ValueError, match="no"):
        probe(model, torch.zeros(1, 3, 8, 8))
    assert flags(model) == before
    assert hooks(model) == 0
    calls, shape, note = probe(model)
    assert (calls, shape) == ({}, None)
    assert note is not None
    assert "ValueError: no" in note
    assert flags(model) == before
    assert hooks(model) == 0


def test_modes_gradients_and_hooks_are_restored_after_a_pass() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).train()
    model[1].eval()
    model[0].register_forward_hook(lambda m, x, y: None)
    before, statistics = flags(model), model[1].running_mean.clone()
    calls, shape, note = probe(model, torch.randn(2, 3, 8, 8))
    assert flags(model) == before
    assert hooks(model) == 1
    assert torch.is_grad_enabled()
    assert torch.equal(model[1].running_mean, statistics)
    assert (shape, note) == ((2, 3, 8, 8), None)
    first, last = calls[model[0]], calls[model[2]]
    assert (first.order, first.pixels, first.sees_image) == (0, 72, True)
    assert (last.order, last.pixels, last.sees_image) == (1, 72, False)


def test_evaluating_runs_without_gradients_and_restores_each_flag() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2)).train()
    model[0].eval()
    with evaluating(model):
        assert flags(model) == [False, False, False]
        assert not torch.is_grad_enabled()
    assert flags(model) == [True, False, True]


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_the_default_input_of_a_timm_model_has_its_channels(in_chans: int) -> None:
    model = timm.create_model("test_resnet", pretrained=False, in_chans=in_chans)
    image = default_input(model)
    assert image is not None
    assert image.shape == (1, in_chans, *model.pretrained_cfg["input_size"][1:])
    assert not image.any()


@pytest.mark.parametrize("in_chans", [1, 2, 4, 5, 12])
def test_a_timm_model_of_any_channels_is_probed_without_an_example(in_chans: int) -> None:
    model = timm.create_model("test_resnet", pretrained=False, in_chans=in_chans)
    calls, shape, note = probe(model)
    assert note is None
    assert shape == (1, in_chans, *model.pretrained_cfg["input_size"][1:])
    assert len(calls) == sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())


def test_the_default_input_of_other_models() -> None:
    image = default_input(nn.Sequential(nn.Conv2d(2, 4, 3)).half())
    assert image is not None
    assert (tuple(image.shape), image.dtype) == ((1, 2, 224, 224), torch.float16)
    assert default_input(nn.Sequential(nn.ReLU())) is None
    named: Any = nn.Sequential(nn.Conv2d(3, 4, 3))
    named.pretrained_cfg = {"input_size": None, "test_input_size": (3, 64, 48)}
    image = default_input(named)
    assert image is not None
    assert image.shape == (1, 3, 64, 48)


def test_the_input_of_a_stem_that_folds_space_into_channels_is_the_configured_one() -> None:
    model: Any = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, 4, 3))
    model.pretrained_cfg = {"input_size": (3, 32, 32)}
    calls, shape, note = probe(model)
    assert (shape, note) == ((1, 3, 32, 32), None)
    assert calls[model[1]].pixels == 36


def test_model_cfg_is_empty_where_there_is_none() -> None:
    assert model_cfg(nn.Linear(2, 2)) == {}


def test_a_network_without_parameters_has_a_note() -> None:
    calls, shape, note = probe(nn.Sequential(nn.ReLU()))
    assert (calls, shape) == ({}, None)
    assert note is not None
    assert "no parameters" in note


class Detector(nn.Module):
    """Takes a list of images, as torchvision's detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, images: list[Tensor]) -> Tensor:
        if not isinstance(images, list):
            raise TypeError("a list of images is needed")
        return torch.stack([self.conv(image[None])[0] for image in images])


class Flow(nn.Module):
    """Takes two images, as optical flow does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.conv(first) - self.conv(second)


@pytest.mark.parametrize(("kind", "times"), [(Detector, 1), (Flow, 2)])
def test_detectors_and_flow_networks_are_fed_as_they_ask(kind: type[nn.Module], times: int) -> None:
    model: Any = kind()
    model.pretrained_cfg = {"input_size": (3, 16, 12)}
    calls, shape, note = probe(model)
    assert (shape, note) == ((1, 3, 16, 12), None)
    assert calls[model.conv].pixels == times * 16 * 12


def test_positions_of_transposed_convs_and_linear_layers() -> None:
    model = nn.Sequential(
        nn.ConvTranspose2d(3, 4, 2, stride=2), nn.AvgPool2d(2), nn.Linear(5, 7), nn.Conv2d(4, 2, 3)
    )
    calls, _, _ = probe(model, torch.zeros(2, 3, 6, 5))
    assert [calls[layer].pixels for layer in model if layer in calls] == [
        2 * 6 * 5,  # each input position is multiplied by the whole weight
        2 * 4 * 6,  # each row of 5
        2 * 4 * 5,  # each output position
    ]
    assert [calls[layer].order for layer in model if layer in calls] == [0, 1, 2]
