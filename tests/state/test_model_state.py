"""What hangs on a model, and that it goes with the model."""

from __future__ import annotations

import copy
import pickle  # a round trip, as copies between processes make it

import torch
from torch import nn

import legocompress as lego
from legocompress.state.conversion import ConversionRecord


def converted() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3))
    spec = lego.LegoSpec(m=0.5, o=2, allow_expansion=True)
    return lego.convert_(model, lego.plan(model, spec, torch.zeros(1, 3, 8, 8)), seed=4)


def test_a_model_without_a_state_gets_an_empty_one() -> None:
    model = nn.Linear(2, 2)
    assert lego.lego_state(model) == lego.LegoState()
    assert lego.lego_state(model) is lego.lego_state(model)
    assert lego.lego_state(nn.Linear(2, 2)) is not lego.lego_state(model)


def test_each_step_fills_its_own_field() -> None:
    state = lego.lego_state(converted())
    assert isinstance(state.conversion, ConversionRecord)
    assert state.conversion.seed == 4
    assert state.source == lego.Source(None, None)
    assert (state.calibration, state.choices, state.deployment) == (None, (), None)


def test_the_state_is_copied_with_the_model_and_is_no_part_of_its_tensors() -> None:
    model = converted()
    copied = copy.deepcopy(model)
    assert lego.lego_state(copied) == lego.lego_state(model)
    lego.lego_state(copied).source = None
    assert lego.lego_state(model).source == lego.Source(None, None)
    assert not any("lego_state" in name for name in model.state_dict())


def test_the_state_is_copied_with_a_traced_model() -> None:
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3)))
    spec = lego.LegoSpec(m=0.5, o=2, allow_expansion=True)
    lego.convert_(model, lego.plan(model, spec, torch.zeros(1, 3, 8, 8)), seed=4)
    for copied in (copy.deepcopy(copy.deepcopy(model)), pickle.loads(pickle.dumps(model))):
        assert lego.lego_state(copied) == lego.lego_state(model)
        assert isinstance(lego.lego_state(copied).conversion, ConversionRecord)
        lego.lego_state(copied).source = None
        assert lego.lego_state(model).source == lego.Source(None, None)
