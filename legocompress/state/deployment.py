"""Which routes a deployed network takes, and the machine that they hold for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Format = Literal["nchw", "channels_last"]
ConvRoute = Literal["assemble", "onednn", "reference", "table", "fused", "winograd"]
PoolRoute = Literal["plain", "kernel"]
SiteRoute = ConvRoute | PoolRoute
Text = Annotated[str, Field(max_length=1000)]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Machine(_Value):
    """What a choice of routes holds for; on another machine, or at other sizes, it is a guess."""

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
    routes: dict[Text, SiteRoute]
