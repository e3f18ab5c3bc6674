"""Which routes a deployed network takes, layer by layer, and the machine that they hold for."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from torch import Tensor

from legocompress import kernels
from legocompress.state.deployment import ConvRoute, Machine, PoolRoute

DENSE_ROUTES: tuple[ConvRoute, ...] = ("assemble", "onednn")
POOL_ROUTES: tuple[PoolRoute, ...] = ("plain", "kernel")


def this_machine(inputs: tuple[Tensor, ...]) -> Machine:
    """The machine, library and sizes that timings with these inputs would hold for."""
    device = inputs[0].device
    cuda = device.type == "cuda"
    return Machine(
        processor=torch.cuda.get_device_name(device) if cuda else _processor(),
        instructions="none" if cuda or not kernels.available() else kernels.isa(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        input_shapes=tuple(tuple(x.shape) for x in inputs),
        dtype=str(inputs[0].dtype).removeprefix("torch."),
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()[:1000]
    return (platform.processor() or platform.machine())[:1000]
