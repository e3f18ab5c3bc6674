"""The one typed place for everything that hangs on a model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from legocompress.state.calibration import Calibration
from legocompress.state.conversion import ConversionRecord
from legocompress.state.deployment import Choices, Deployment
from legocompress.state.quantization import Quantization
from legocompress.state.source import Source

NAME = "lego_state"
# A copy of a GraphModule keeps only the attributes that this entry of its `meta` holds.
PRESERVED = "_user_preserved_attributes"


@dataclass
class LegoState:
    """What is known about one model; each step of the pipeline fills its own field.

    Attributes:
        source: what rebuilds the network; None where nothing is known.
        conversion: what the conversion was asked for, and the recipe of a fine-tuning.
        calibration: what the network was calibrated with, and the effect.
        quantization: how the network is quantised; None where it computes in floating point.
        choices: routes that `deploy_` has chosen, one entry per machine, threads and input sizes.
        deployment: what `deploy_` did; None while the network is not deployed.
    """

    source: Source | None = None
    conversion: ConversionRecord | None = None
    calibration: Calibration | None = None
    quantization: Quantization | None = None
    choices: tuple[Choices, ...] = ()
    deployment: Deployment | None = None


def lego_state(model: nn.Module) -> LegoState:
    """Return the state of a model, which may be changed; a model without one gets an empty one.

    The state is an attribute of the model, so it is copied with the model and goes with it.
    """
    state = model.__dict__.get(NAME)
    if not isinstance(state, LegoState):
        state = model.__dict__[NAME] = LegoState()
    if isinstance(model, fx.GraphModule):
        model.meta.setdefault(PRESERVED, {})[NAME] = state
    return state


def quantization_of(model: nn.Module) -> Quantization | None:
    """How a model is quantised, or None; the model gets no state by it."""
    state = model.__dict__.get(NAME)
    return state.quantization if isinstance(state, LegoState) else None
