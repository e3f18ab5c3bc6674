"""The choices of `deploy_`: memory formats and routes, with the machine that they were timed on."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from legocompress import kernels
from legocompress.deploy.memory_format import Format

# The names of the backends of a conv; `backends.BACKENDS` has one entry for each.
ConvRoute = Literal["assemble", "onednn", "reference", "table", "fused", "winograd"]
# Pooling, mean and linear layers: PyTorch's own, or a kernel of this package.
PlainRoute = Literal["plain", "kernel"]
Route = ConvRoute | PlainRoute
PLAIN_ROUTES: tuple[PlainRoute, ...] = ("plain", "kernel")

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


def describe_machine(inputs: tuple[Tensor, ...]) -> Machine:
    """The machine, threads, library and input sizes on which times taken now depend."""
    device = inputs[0].device
    cuda = device.type == "cuda"
    return Machine(
        processor=torch.cuda.get_device_name(device) if cuda else _processor_name(),
        instructions="none" if cuda or not kernels.available() else kernels.isa(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        input_shapes=tuple(tuple(x.shape) for x in inputs),
        dtype=str(inputs[0].dtype).removeprefix("torch."),
    )


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()[:1000]
    return (platform.processor() or platform.machine())[:1000]
