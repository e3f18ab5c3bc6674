"""Describe the machine on which routes are timed."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from torch import Tensor

from legocompress import kernels
from legocompress.state.deployment import Machine


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
