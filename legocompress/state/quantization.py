"""The record of a quantisation: all that, with the weights, defines the integers of a network."""

from __future__ import annotations

import math
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

Precision = Literal["int8"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
MAX_ENTRIES = 2**16  # tensors or layers of one network
MAX_PARTS = 2**10
MAX_INPUT_VALUES = 2**26  # of the inputs that a network is traced with
Name = Annotated[str, Field(max_length=1000)]
SHIFT_LETTERS = "abcdefghijklmnopqrstuvwxy"  # 0 to 24


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class MapRange(_Record):
    """What the uint8 values q of a map stand for: scale * (q - zero)."""

    scale: float = Field(ge=1e-30, le=1e30)
    zero: int = Field(ge=0, le=255)


class ConvShifts(_Record):
    """The shifts of an integer conv, see `lego.integer`.

    `filters` has one letter per filter, 'a' for a shift of 0 to 'y' for 24.
    """

    filters: str = Field(min_length=1, max_length=2**20, pattern="^[a-y]+$")
    output: int = Field(ge=0, le=7)


class QuantizedPart(_Record):
    """The integers of a network, or of a part of it that is traced by itself.

    Attributes:
        inputs: shapes of the inputs that the part is traced with.
        ranges: by name of the tensor: of a layer's output, its name; '.pre' is added for what its
            activation reads.
        shifts: by name of the layer.
        float_layers: layers that could compute in integers and stay in fp32, with the reason.
    """

    inputs: tuple[tuple[Annotated[int, Field(ge=1, le=2**16)], ...], ...] = Field(
        min_length=1, max_length=2
    )
    ranges: dict[Name, MapRange] = Field(max_length=MAX_ENTRIES)
    shifts: dict[Name, ConvShifts] = Field(max_length=MAX_ENTRIES)
    float_layers: dict[Name, Name] = Field(default_factory=dict, max_length=MAX_ENTRIES)

    @field_validator("inputs")
    @classmethod
    def _limit_inputs(cls, inputs: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        for shape in inputs:
            if len(shape) > 8 or math.prod(shape) > MAX_INPUT_VALUES:
                raise ValueError(f"at most {MAX_INPUT_VALUES:,} values are allowed in an input")
        return inputs


class Quantization(_Record):
    """How a network is quantised, stored as `lego_state(model).quantization`.

    Attributes:
        precision: of maps and weights.
        method: how the ranges of most maps were chosen.
        images: number of images that the ranges were measured on.
        sha256: over these images.
        parts: by name of the traced module, '' for the whole network.
        dense_layers: layers that are no Lego modules and whose weights are int8.
        notes: parts of the network that run by their own code, and why.
        error: ||y - y'|| / ||y|| of the outputs of the fp32 and the quantised network, centred.
        agreement: percentage of images with the same first class; None for other outputs.
    """

    precision: Precision
    method: str = Field(max_length=100)
    images: int = Field(ge=1)
    sha256: str = Field(max_length=64)
    parts: dict[Name, QuantizedPart] = Field(max_length=MAX_PARTS)
    dense_layers: tuple[Name, ...] = Field(max_length=MAX_ENTRIES)
    notes: tuple[Name, ...] = Field(default=(), max_length=MAX_ENTRIES)
    error: float
    agreement: float | None

    @property
    def float_layers(self) -> dict[str, str]:
        """The layers that could compute in integers and stay in fp32, with the reason."""
        return {
            name: why for part in self.parts.values() for name, why in part.float_layers.items()
        }
