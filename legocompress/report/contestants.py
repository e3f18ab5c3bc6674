"""The networks of a comparison: opened by name, with what they take, weigh and cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from legocompress.checkpoint import open_model
from legocompress.checkpoint.hub import local_folder
from legocompress.errors import DataError, UsageError
from legocompress.lego.module import lego_modules
from legocompress.models.inputs import check_one_input
from legocompress.models.outputs import describe_output, find_logits
from legocompress.models.probe import default_input, evaluating, model_cfg
from legocompress.report.measurement import measure
from legocompress.report.onnx_session import OnnxNetwork

Kind = Literal["lego", "dense", "onnx"]


@dataclass(frozen=True)
class Contestant:
    """A network to compare.

    Attributes:
        name: what the user called it.
        kind: a compressed folder, a dense network, or an ONNX file.
        network: what runs it.
        image_size: (c, H, W) of its images; None where it takes any.
        n_bytes: size on disk; for a dense network that of its parameters and buffers.
        macs: multiply-accumulates for one image; None if unknown.
    """

    name: str
    kind: Kind
    network: nn.Module | OnnxNetwork
    image_size: tuple[int | None, ...]
    n_bytes: int
    macs: int | None

    def classify(self, images: Tensor) -> Tensor:
        """The logits (N, classes) of images (N, c, H, W).

        Raises:
            DataError: the network refuses the images, or has no such output.
        """
        if isinstance(self.network, OnnxNetwork):
            output: Any = self.network(images)
        else:
            with evaluating(self.network):
                output = self.network(images)
        logits = find_logits(output, len(images))
        if logits is None:
            raise DataError(
                f"the output of {self.name!r} is {describe_output(output)}; comparing needs one "
                "tensor (N, classes)"
            )
        return logits


def open_contestants(names: Sequence[str]) -> list[Contestant]:
    """Open networks by name: compressed folders, ONNX files, or what `open_model` takes.

    Raises:
        UsageError: a network takes several inputs, or the networks take images of different sizes.
        LegoError: as `open_model` and `OnnxNetwork` raise.
    """
    networks = [_open(name) for name in names]
    sizes = {name: _image_size(network) for name, network in networks}
    image_size = check_same_sizes(sizes)
    return [_measure(name, network, sizes[name], image_size) for name, network in networks]


def check_same_sizes(sizes: dict[str, tuple[int | None, ...]]) -> tuple[int, ...]:
    """Return the image size (c, H, W) that all networks take; one that is open fits any.

    Raises:
        UsageError: two of the networks take different sizes, or no network names one.
    """
    agreed: list[int] = []
    for axis in range(3):
        named = {name: size[axis] for name, size in sizes.items() if size[axis] is not None}
        if not named:
            raise UsageError(
                "no network names the size of its images; compare with a network that does"
            )
        first = next(iter(named))
        for name, length in named.items():
            if length != named[first]:
                raise UsageError(
                    f"{first!r} takes images of {_format_size(sizes[first])} and {name!r} of "
                    f"{_format_size(sizes[name])} (channels x height x width); compare networks "
                    "that take the same images"
                )
        agreed.append(named[first])  # type: ignore[arg-type]
    return tuple(agreed)


def find_preprocessing(contestants: Iterable[Contestant]) -> nn.Module:
    """Return the first network that names the preprocessing of its images.

    Raises:
        UsageError: none does, such as where all are ONNX files.
    """
    for contestant in contestants:
        network = contestant.network
        if isinstance(network, nn.Module) and model_cfg(network).get("mean"):
            return network
    raise UsageError(
        "none of these networks names the preprocessing of its images (ONNX files have none); add "
        "the network that they were made from"
    )


def _open(name: str) -> tuple[str, nn.Module | OnnxNetwork]:
    if name.endswith(".onnx") or Path(name).is_file():
        return name, OnnxNetwork(Path(name), torch.get_num_threads())
    network = open_model(name).eval()
    check_one_input(network, "compare")
    return name, network


def _image_size(network: nn.Module | OnnxNetwork) -> tuple[int | None, ...]:
    if isinstance(network, OnnxNetwork):
        return network.image_size
    image = default_input(network)
    return (None, None, None) if image is None else tuple(image.shape[1:])


def _measure(
    name: str,
    network: nn.Module | OnnxNetwork,
    own_size: tuple[int | None, ...],
    image_size: tuple[int, ...],
) -> Contestant:
    """Measure the size and cost of a network."""
    if isinstance(network, OnnxNetwork):
        macs = network.count_macs(image_size)
        return Contestant(name, "onnx", network, own_size, network.count_bytes(), macs)
    totals = measure(network, example_input=torch.zeros(1, *image_size)).totals()
    if any(True for _ in lego_modules(network)):
        folder = local_folder(name)
        files = (file for file in folder.rglob("*") if file.is_file())
        n_bytes = sum(file.stat().st_size for file in files)
        return Contestant(name, "lego", network, own_size, n_bytes, totals["macs"])
    tensors = (*network.parameters(), *network.buffers())
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return Contestant(name, "dense", network, own_size, n_bytes, totals["macs"])


def _format_size(size: tuple[int | None, ...]) -> str:
    return " x ".join("any" if length is None else str(length) for length in size)
