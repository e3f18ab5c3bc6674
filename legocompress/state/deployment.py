"""What `deploy_` chose and did, and the machine that the choices hold for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Format = Literal["nchw", "channels_last"]
# The names of the backends of a conv; `deploy.backends.BACKENDS` has one entry for each.
ConvRoute = Literal["assemble", "onednn", "reference", "table", "fused", "winograd"]
# Pooling, mean and linear layers: PyTorch's own, or a kernel of this package.
PlainRoute = Literal["plain", "kernel"]
Route = ConvRoute | PlainRoute
Text = Annotated[str, Field(max_length=1000)]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Machine(_Value):
    """What times depend on; on another machine, or at other sizes, choices are only a guess."""

    processor: Text
    instructions: Text
    threads: int = Field(ge=1, le=2**20)
    torch: Text
    input_shapes: tuple[tuple[int, ...], ...]
    dtype: Text


class Choices(_Value):
    """A memory format for each graph of the network, and a route for each layer in them."""

    machine: Machine
    formats: dict[Text, Format]
    routes: dict[Text, Route]


@dataclass(frozen=True)
class Deployment:
    """What `deploy_` did, stored as `lego_state(model).deployment`.

    `milliseconds` holds, for each layer, the median of each route in each memory format
    ('fused, nchw'); it is empty where the choices were not timed now. `notes` says which parts
    could not be traced or deployed, and why. `hint_used` is whether the choices of the checkpoint
    were used. `precision` is 'int8' for a quantised network, of which nothing is timed.
    """

    choices: Choices
    n_layers: int
    n_lego: int
    n_norms: int
    n_activations: int
    n_sums: int
    milliseconds: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    hint_used: bool = False
    precision: str = "fp32"
